//! `knibfs export`: a disk of a backup as a file of its own.

use std::path::PathBuf;

use super::operation::operate;
use super::output::size;
use super::{Context, Outcome};
use crate::ops::export;
use crate::store::DiskSpec;
use crate::store::manifest::ImageFormat;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The disk; `latest` is the newest backup.
    #[arg(value_name = "VM/BACKUP/DISK")]
    disk: DiskSpec,
    /// The file to write; it must not be there.
    file: PathBuf,
    /// Its format.
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    format: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// The guest's bytes, with holes for zeros.
    Raw,
    /// A qcow2 file that stands on nothing.
    Qcow2,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let format = match args.format {
        Format::Raw => ImageFormat::Raw,
        Format::Qcow2 => ImageFormat::Qcow2,
    };
    let exported = operate(|control| export::run(&store, &args.disk, &args.file, format, control))?;
    context.out.print(&exported, || {
        format!("{}: {} of {}", exported.path.display(), exported.format, size(exported.virtual_size))
    })?;
    Ok(())
}
