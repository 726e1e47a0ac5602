//! `knibfs remove`.

use super::operation::operate;
use super::{Context, Outcome};
use crate::ops::remove::{self, How};
use crate::store::BackupSpec;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The backups, in any order; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP", required = true)]
    backups: Vec<BackupSpec>,

    /// Forget also what cannot be deleted, read or reached, and say what is left.
    #[arg(long)]
    force: bool,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let done = operate(|control| remove::run(&store, &args.backups, args.force, control))?;
    context.out.print(&done, || {
        let mut lines: Vec<String> = done
            .backups
            .iter()
            .map(|fate| match fate.how {
                How::Deleted => format!("{} was deleted", fate.backup),
                How::Hidden => format!("{} is kept, hidden, for the backups that stand on it", fate.backup),
                How::DeletedAfterHidden => {
                    format!("{}, which was kept for what stood on it, was deleted", fate.backup)
                }
            })
            .collect();
        lines.extend(done.notes.iter().map(|note| format!("note: {note}")));
        lines.extend(done.left.iter().map(|path| format!("left: {}", path.display())));
        lines.join("\n")
    })?;
    Ok(())
}
