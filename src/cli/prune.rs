//! `knibfs prune`.

use super::operation::operate;
use super::output::table;
use super::{Context, Failure, Outcome};
use crate::chain::retention::Keep;
use crate::ops::prune::{self, PruneError, Pruned};
use crate::store::VmName;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this VM's.
    vm: Option<VmName>,

    /// Keep so many of the newest.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,

    /// Keep the newest of each hour (UTC), for so many hours that have a backup.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: u32,

    /// The same for days.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,

    /// The same for weeks, which begin on Mondays.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,

    /// The same for months.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: u32,

    /// The same for years.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_yearly: u32,

    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let keep = Keep {
        last: args.keep_last,
        hourly: args.keep_hourly,
        daily: args.keep_daily,
        weekly: args.keep_weekly,
        monthly: args.keep_monthly,
        yearly: args.keep_yearly,
    };
    if keep.is_nothing() {
        let what = "say what to keep, with --keep-last, --keep-daily, …: nothing would be left otherwise";
        return Err(Failure::Usage(what.into()));
    }
    let store = context.open_store()?;
    let vms = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => store.vms()?,
    };
    let done = operate(|control| {
        vms.iter()
            .map(|vm| prune::run(&store, vm, &keep, args.dry_run, control))
            .collect::<Result<Vec<_>, PruneError>>()
    })?;
    context.out.print(&done, || done.iter().map(text).collect::<Vec<_>>().join("\n"))?;
    Ok(())
}

fn text(done: &Pruned) -> String {
    let vm = &done.vm;
    let mut rows: Vec<Vec<String>> = Vec::new();
    for kept in &done.kept {
        let why: Vec<String> = kept.why.iter().map(ToString::to_string).collect();
        rows.push(vec!["keep".into(), format!("{vm}/{}", kept.backup), why.join(", ")]);
    }
    let (remove, merge) = if done.dry_run { ("would remove", "would merge") } else { ("removed", "merged") };
    rows.extend(done.removed.iter().map(|name| vec![remove.into(), format!("{vm}/{name}")]));
    for merged in &done.merged {
        for from in &merged.from {
            rows.push(vec![merge.into(), format!("{vm}/{from}"), format!("into {}", merged.into)]);
        }
    }
    let mut lines = table(&rows);
    lines.extend(done.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n")
}
