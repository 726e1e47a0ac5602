//! `knibfs backup`.

use super::operation::operate;
use super::{Context, Outcome};
use crate::ops::backup::{self, Options};
use crate::ops::compress;
use crate::store::VmName;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM.
    vm: VmName,

    /// A full backup outside every chain, which leaves nothing on primary.
    #[arg(long)]
    isolated: bool,

    /// Freeze the guest's file systems through its agent, or fail.
    #[arg(long)]
    quiesce: bool,

    /// Return without compressing: `knibfs compress` does it then.
    #[arg(long)]
    no_wait: bool,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let options = Options { isolated: args.isolated, quiesce: args.quiesce };
    let manifest = operate(|control| {
        let manifest = backup::run(&store, &args.vm, options, control)?;
        if args.no_wait {
            return Ok::<_, anyhow::Error>(manifest);
        }
        Ok(compress::after_backup(&store, manifest, control)?)
    })?;
    context.out.print(&manifest, || format!("{}/{}", manifest.vm, manifest.name))?;
    Ok(())
}
