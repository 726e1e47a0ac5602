//! `knibfs restore`, `restore-volume`, `create-vm`.

use std::path::PathBuf;

use super::operation::operate;
use super::{Context, Failure, Outcome};
use crate::ops::restore::{self, Options, Restored};
use crate::store::{BackupSpec, DiskName, DiskSpec, VmName};

#[derive(Debug, clap::Args)]
pub struct How {
    /// Start on the mounted backup at once, then pull the data. The backup is kept until all is pulled.
    #[arg(long)]
    quick: bool,

    /// The host that the VM starts on (see `knibfs host list`).
    #[arg(long, value_name = "HOST")]
    host: Option<String>,

    /// Megabytes (of 1,000,000 bytes) per second, at most; without it there is no limit.
    #[arg(long, value_name = "MB/s", value_parser = rate)]
    rate: Option<u64>,

    /// Size of the restored disk, no smaller than in the backup: bytes, or with K, M, G or T (powers of 1024). Where the
    /// backup has several disks, DISK=SIZE, once for each.
    #[arg(long = "size", value_name = "[DISK=]SIZE", value_parser = disk_size)]
    sizes: Vec<(Option<DiskName>, u64)>,

    /// Folder for the new images, instead of where the volumes are.
    #[arg(long, value_name = "DIR")]
    storage: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    /// The backup; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP")]
    backup: BackupSpec,

    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Args)]
pub struct VolumeArgs {
    /// The disk of a backup; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP/DISK")]
    disk: DiskSpec,

    /// The VM that gets the volume.
    #[arg(long, value_name = "VM")]
    to: VmName,

    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// The backup; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP")]
    backup: BackupSpec,

    /// Name of the new VM, in the store and as a domain.
    #[arg(long, value_name = "NAME")]
    name: VmName,

    #[command(flatten)]
    how: How,
}

fn rate(text: &str) -> Result<u64, String> {
    let rate = text.parse().ok().filter(|rate| (1..=1_000_000).contains(rate));
    rate.ok_or_else(|| "it is a whole number from 1 to 1000000; leave it out for no limit".into())
}

impl How {
    fn options(&self) -> Result<Options, Failure> {
        let storage = match &self.storage {
            Some(path) => Some(path.canonicalize().map_err(|e| {
                anyhow::anyhow!(
                    "cannot use {} for new images: {e}; name a folder that is there",
                    path.display()
                )
            })?),
            None => None,
        };
        Ok(Options {
            quick: self.quick,
            host: self.host.clone(),
            rate: self.rate.map(|r| r * 1_000_000),
            sizes: self.sizes.clone(),
            storage,
        })
    }
}

pub fn run(context: &Context, args: &RestoreArgs) -> Outcome {
    let (store, options) = (context.open_store()?, args.how.options()?);
    let done = operate(|control| restore::same_vm(&store, &args.backup, &options, control))?;
    report(context, &done)
}

pub fn run_volume(context: &Context, args: &VolumeArgs) -> Outcome {
    let (store, options) = (context.open_store()?, args.how.options()?);
    let done = operate(|control| restore::new_volume(&store, &args.disk, &args.to, &options, control))?;
    report(context, &done)
}

pub fn run_create(context: &Context, args: &CreateArgs) -> Outcome {
    let (store, options) = (context.open_store()?, args.how.options()?);
    let done = operate(|control| restore::new_vm(&store, &args.backup, &args.name, &options, control))?;
    report(context, &done)
}

fn report(context: &Context, done: &Restored) -> Outcome {
    context.out.print(done, || {
        let line = |v: &restore::RestoredVolume| {
            let target = v.target.as_deref().map_or(String::new(), |t| format!(" ({t})"));
            format!("{}/{} -> {}/{}{target}  {}", done.backup, v.disk, done.vm, v.name, v.path.display())
        };
        done.volumes.iter().map(line).collect::<Vec<_>>().join("\n")
    })?;
    Ok(())
}

/// `20G`, `vda=20G`.
fn disk_size(text: &str) -> Result<(Option<DiskName>, u64), String> {
    let (name, size) = match text.split_once('=') {
        Some((name, size)) => (Some(DiskName::new(name).map_err(|e| e.to_string())?), size),
        None => (None, text),
    };
    let digits = size.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match size.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err("give bytes, or a number with K, M, G or T".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "give bytes, or a number with K, M, G or T".to_owned())?;
    let bytes = number.checked_mul(1 << shift).filter(|b| *b <= 1 << 53 && *b > 0);
    let bytes = bytes.ok_or("a disk has at least one byte and at most 8 PiB")?;
    if bytes % 512 != 0 {
        return Err("a disk's size is a multiple of 512 bytes".into());
    }
    Ok((name, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_a_disk() {
        assert_eq!(disk_size("1G"), Ok((None, 1 << 30)));
        assert_eq!(disk_size("vda=2MiB"), Ok((Some(DiskName::new("vda").unwrap()), 2 << 20)));
        for bad in ["", "vda=", "=1G", "0", "1x", "-1", "513", "99999999999T"] {
            assert!(disk_size(bad).is_err(), "{bad}");
        }
    }
}
