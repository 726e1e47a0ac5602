//! `knibfs check`: whether backups are as they were written.

use anyhow::anyhow;

use super::operation::operate;
use super::output::size;
use super::{Context, Failure, Outcome};
use crate::ops::check;
use crate::store::{BackupSpec, VmName};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A VM, or one backup of it with those that it stands on; without it, all are checked.
    #[arg(value_name = "VM[/BACKUP]")]
    what: Option<String>,
    /// Read and verify every stored byte, too.
    #[arg(long)]
    read_data: bool,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let usage = |e: crate::store::names::NameError| Failure::Usage(e.to_string());
    let (vm, backup) = match args.what.as_deref() {
        None => (None, None),
        Some(what) if what.contains('/') => {
            let manifest = store.resolve(&what.parse::<BackupSpec>().map_err(usage)?)?;
            (Some(manifest.vm), Some(manifest.name))
        }
        Some(what) => (Some(what.parse::<VmName>().map_err(usage)?), None),
    };
    let mut stopped = false;
    let report = operate(|control| {
        let report = check::run(&store, vm.as_ref(), backup.as_ref(), args.read_data, control);
        stopped = control.is_cancelled();
        report
    })?;
    context.out.print(&report, || {
        let many = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut text =
            format!("{} with {} checked", many(report.backups, "backup"), many(report.images, "image"));
        if args.read_data {
            text += &format!(", {} read and verified", size(report.bytes));
        }
        for damage in &report.damage {
            text += &format!("\ndamaged: {damage}");
        }
        text
    })?;
    if stopped {
        return Err(Failure::Failed(anyhow!("stopped as asked: not all was checked")));
    }
    match report.damage.len() {
        0 => Ok(()),
        n => Err(Failure::Failed(anyhow!(
            "{n} {} damaged: take a new backup of these VMs, which will be full, and look at the disk of the store",
            if n == 1 { "thing is" } else { "things are" }
        ))),
    }
}
