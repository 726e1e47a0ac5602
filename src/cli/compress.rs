//! `knibfs compress`: a stored backup with compressed clusters.

use super::operation::operate;
use super::output::size;
use super::{Context, Outcome};
use crate::ops::compress;
use crate::store::BackupSpec;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The backup; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP")]
    backup: BackupSpec,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let manifest = store.resolve(&args.backup)?;
    let done = operate(|control| compress::run(&store, &manifest.vm, &manifest.name, control))?;
    context.out.print(&done, || {
        format!("{}/{}: {} instead of {}", done.vm, done.backup, size(done.after), size(done.before))
    })?;
    Ok(())
}
