//! `knibfs show`: one backup.

use std::fmt::Write as _;

use super::output::{size, table};
use super::{Context, Outcome};
use crate::store::{BackupSpec, Manifest};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The backup; `latest` is the newest.
    #[arg(value_name = "VM/BACKUP")]
    backup: BackupSpec,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let manifest = store.resolve(&args.backup)?;
    context.out.print(&manifest, || text(&manifest))?;
    Ok(())
}

fn text(m: &Manifest) -> String {
    let mut rows = vec![
        vec!["backup".to_owned(), format!("{}/{}", m.vm, m.name)],
        vec!["id".into(), m.id.to_string()],
        vec!["state".into(), format!("{}, {}, {}", m.state, m.compression, m.validation)],
        vec!["taken".into(), format!("{}{}", m.taken, if m.quiesced { ", file systems frozen" } else { "" })],
        vec!["finished".into(), m.finished.to_string()],
    ];
    rows.push(vec!["parent".into(), m.parent.as_ref().map_or("none".into(), |p| p.name.to_string())]);
    let place = if m.isolated {
        "isolated".to_owned()
    } else {
        format!("number {} of its chain{}", m.position, if m.end_of_chain { ", which ends here" } else { "" })
    };
    rows.push(vec!["chain".into(), place]);
    rows.push(vec!["made by".into(), format!("knibfs {}", m.knibfs_version)]);
    let mut text = table(&rows).join("\n");
    for disk in &m.disks {
        let _ = write!(
            text,
            "\n\n{} ({})\n  {}: {}\n  {} seen by the guest, {} stored, {} deep\n  from {} ({})",
            disk.name,
            disk.target.as_deref().unwrap_or("a plain disk file"),
            disk.kind,
            disk.reason,
            size(disk.virtual_size),
            size(disk.file_size),
            disk.depth,
            disk.primary.path.display(),
            disk.primary.format,
        );
        let _ = match disk.compression {
            Some(how) => write!(
                text,
                "\n  {} of {} clusters compressed with {how}",
                disk.compressed_clusters, disk.data_clusters
            ),
            None => write!(text, "\n  {} clusters, none compressed", disk.data_clusters),
        };
    }
    for skipped in &m.skipped {
        let _ = write!(text, "\n\n{} was left out: {}", skipped.disk, skipped.reason);
    }
    for note in &m.notes {
        let _ = write!(text, "\n\nnote: {note}");
    }
    text
}
