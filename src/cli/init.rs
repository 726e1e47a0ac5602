//! `knibfs init`.

use std::path::PathBuf;

use serde_json::json;

use super::{Context, Outcome};
use crate::store::Store;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder: new, or empty.
    #[arg(value_name = "STORE")]
    path: PathBuf,

    /// Files are never rewritten: backups are compressed while they are copied.
    #[arg(long)]
    write_once: bool,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = Store::init(&args.path, args.write_once)?;
    let value = json!({ "id": store.id(), "path": store.root(), "write_once": store.is_write_once() });
    context.out.print(&value, || format!("{}", store.root().display()))?;
    Ok(())
}
