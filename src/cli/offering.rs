//! `knibfs offering`.

use clap::ValueEnum;
use jiff::Timestamp;

use super::output::table;
use super::{Context, Outcome};
use crate::store::manifest::Compression;
use crate::store::{Offering, OfferingId};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make an offering.
    Create {
        /// Its name.
        name: String,
        /// Compress backups.
        #[arg(long)]
        compress: bool,
        /// Validate backups.
        #[arg(long)]
        validate: bool,
        /// Allow quick restores.
        #[arg(long)]
        allow_quick_restore: bool,
        /// Allow guests' files to be taken out.
        #[arg(long)]
        allow_extract_file: bool,
        /// Backups in a chain, instead of the setting backup.chain.size.
        #[arg(long, value_name = "N", allow_negative_numbers = true)]
        chain_size: Option<i64>,
        /// How clusters are compressed.
        #[arg(long, value_name = "LIBRARY", default_value = "zstd")]
        compression_library: Library,
    },
    /// List offerings.
    List,
    /// Delete an offering that no VM is assigned to.
    Delete {
        /// Its id or name.
        #[arg(value_name = "ID")]
        id: String,
    },
}

/// Compression libraries.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Library {
    /// Zstandard.
    Zstd,
    /// Deflate.
    Zlib,
}

pub fn run(context: &Context, command: Command) -> Outcome {
    let store = context.open_store()?;
    match command {
        Command::Create {
            name,
            compress,
            validate,
            allow_quick_restore,
            allow_extract_file,
            chain_size,
            compression_library,
        } => {
            let offering = Offering {
                id: OfferingId::random(),
                name,
                compress,
                validate,
                allow_quick_restore,
                allow_extract_file,
                chain_size,
                compression_library: match compression_library {
                    Library::Zstd => Compression::Zstd,
                    Library::Zlib => Compression::Zlib,
                },
                created: Timestamp::now(),
                removed: None,
            };
            store.create_offering(&offering)?;
            context.out.print(&offering, || offering.id.to_string())?;
        }
        Command::List => {
            let offerings = store.offerings(false)?;
            context
                .out
                .print(&offerings, || table(&offerings.iter().map(row).collect::<Vec<_>>()).join("\n"))?;
        }
        Command::Delete { id } => {
            let deleted = store.delete_offering(&id)?;
            context.out.print(&deleted, String::new)?;
        }
    }
    Ok(())
}

fn row(offering: &Offering) -> Vec<String> {
    let mut options = Vec::new();
    if offering.compress {
        options.push(format!("compress ({})", offering.compression_library));
    }
    let flags = [
        (offering.validate, "validate"),
        (offering.allow_quick_restore, "quick restore"),
        (offering.allow_extract_file, "extract files"),
    ];
    options.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, word)| word.to_owned()));
    options.extend(offering.chain_size.map(|size| format!("chain size {size}")));
    vec![offering.name.clone(), offering.id.to_string(), options.join(", ")]
}
