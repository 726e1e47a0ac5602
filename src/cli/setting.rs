//! `knibfs setting`.

use serde_json::json;

use super::output::table;
use super::{Context, Outcome};
use crate::store::settings::SETTINGS;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List all settings with what they mean.
    List,
    /// Print one setting's value.
    Get {
        /// Its name.
        name: String,
    },
    /// Change one setting.
    Set {
        /// Its name.
        name: String,
        /// Its new value.
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
}

pub fn run(context: &Context, command: Command) -> Outcome {
    let store = context.open_store()?;
    match command {
        Command::List => {
            let settings = store.settings()?;
            let rows = SETTINGS.iter().map(|row| (row, settings.get(row.name).unwrap_or(row.default)));
            let value: Vec<_> = rows
                .clone()
                .map(|(row, value)| json!({ "name": row.name, "value": value, "default": row.default, "meaning": row.meaning }))
                .collect();
            let text = || {
                let cells: Vec<_> =
                    rows.map(|(r, v)| vec![r.name.into(), v.to_owned(), r.meaning.into()]).collect();
                table(&cells).join("\n")
            };
            context.out.print(&value, text)?;
        }
        Command::Get { name } => {
            let value = store.setting(&name)?;
            context.out.print(&json!({ "name": name, "value": value }), || value.clone())?;
        }
        Command::Set { name, value } => {
            store.set_setting(&name, &value)?;
            let value = store.setting(&name)?;
            context.out.print(&json!({ "name": name, "value": value }), String::new)?;
        }
    }
    Ok(())
}
