//! `knibfs list`: the backups, and how they stand on each other.

use serde_json::{Value, json};

use super::output::{Colour, Out, size, table};
use super::{Context, Outcome};
use crate::chain::drawing::{Link, Row, Shown, rows};
use crate::store::manifest::{BackupState, CompressionState, Manifest, ValidationState};
use crate::store::{Backups, Store, StoreResult, VmName, VmRecord};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this VM's.
    vm: Option<VmName>,
}

/// A VM as it is listed. Its own record may be damaged; its backups are listed all the same.
struct Listed {
    name: VmName,
    record: StoreResult<VmRecord>,
    backups: Backups,
}

pub fn run(context: &Context, args: &Args) -> Outcome {
    let store = context.open_store()?;
    let names = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => store.vms()?,
    };
    let mut listed = Vec::new();
    for name in names {
        listed.push(look(&store, name, args.vm.is_some())?);
    }
    let value: Vec<Value> = listed.iter().map(to_json).collect();
    context.out.print(&json!({ "vms": value }), || {
        let drawn: Vec<String> = listed.iter().map(|vm| draw(&context.out, vm)).collect();
        drawn.join("\n")
    })?;
    Ok(())
}

fn look(store: &Store, name: VmName, must_exist: bool) -> StoreResult<Listed> {
    let record = store.vm(&name);
    match record {
        Err(error) if must_exist && error.is_not_found() => Err(error),
        record => Ok(Listed { backups: store.backups(&name)?, record, name }),
    }
}

impl Listed {
    fn rows(&self) -> Vec<Row> {
        let current = self.record.as_ref().ok().and_then(|r| r.tracking.current.as_ref()).map(|c| c.id);
        rows(&self.backups.manifests, current)
    }

    fn visible(&self) -> impl Iterator<Item = &Manifest> {
        self.backups.manifests.iter().filter(|m| m.is_listed())
    }
}

fn to_json(vm: &Listed) -> Value {
    let current = vm.record.as_ref().ok().and_then(|r| r.tracking.current.as_ref()).map(|c| c.id);
    let backups: Vec<Value> = vm
        .visible()
        .map(|m| {
            let mut value = serde_json::to_value(m).unwrap_or_default();
            if let Some(object) = value.as_object_mut() {
                object.insert("kind".into(), Shown::of(m).to_string().into());
                object.insert("stored_size".into(), m.stored_size().into());
                object.insert("current".into(), (current == Some(m.id)).into());
            }
            value
        })
        .collect();
    let damaged: Vec<Value> = vm
        .backups
        .damaged
        .iter()
        .map(|(name, error)| json!({ "name": name, "error": error.to_string() }))
        .collect();
    let error = vm.record.as_ref().err().map(ToString::to_string);
    json!({ "name": vm.name, "backups": backups, "damaged": damaged, "error": error })
}

fn draw(out: &Out, vm: &Listed) -> String {
    let mut lines = vec![heading(out, vm)];
    let rows = vm.rows();
    let cells: Vec<Vec<String>> = rows.iter().map(|row| cells(row, vm)).collect();
    for (line, row) in table(&cells).into_iter().zip(&rows) {
        let state =
            row.backup.as_ref().and_then(|name| vm.backups.manifests.iter().find(|m| m.name == *name));
        lines.push(format!("  {}", paint(out, &line, state)));
    }
    for (name, error) in &vm.backups.damaged {
        lines.push(format!("  {}", out.paint(Colour::Red, &format!("✗ {name}  {error}"))));
    }
    if rows.is_empty() && vm.backups.damaged.is_empty() {
        lines.push(out.paint(Colour::Dim, "  no backups"));
    }
    lines.join("\n") + "\n"
}

fn heading(out: &Out, vm: &Listed) -> String {
    let stored = vm.backups.manifests.iter().fold(0u64, |sum, m| sum.saturating_add(m.stored_size()));
    let name = out.paint(Colour::Bold, vm.name.as_str());
    let about = match &vm.record {
        Ok(record) => super::vm::source(record),
        Err(error) => out.paint(Colour::Red, &error.to_string()),
    };
    let count = vm.visible().count();
    format!("{name}  {about}; {count} backup{}, {}", if count == 1 { "" } else { "s" }, size(stored))
}

fn cells(row: &Row, vm: &Listed) -> Vec<String> {
    let mark = match row.link {
        Link::Start => "●",
        Link::Middle => "├─●",
        Link::Last => "╰─●",
        Link::Isolated => "○",
    };
    let Some(manifest) = row.backup.as_ref().and_then(|n| vm.backups.manifests.iter().find(|m| m.name == *n))
    else {
        let mark = if row.link == Link::Start { "┊" } else { "├─┊" };
        return vec![format!("{mark} {} removed, kept", row.hidden)];
    };
    let mut notes = Vec::new();
    if manifest.state != BackupState::BackedUp {
        notes.push(manifest.state.to_string());
    }
    if manifest.compression != CompressionState::Uncompressed {
        notes.push(manifest.compression.to_string());
    }
    if manifest.validation != ValidationState::NotValidated {
        notes.push(manifest.validation.to_string());
    }
    match (row.current, manifest.isolated, row.end_of_chain) {
        (true, ..) => notes.push("current".into()),
        (_, true, _) => notes.push("isolated".into()),
        (.., true) => notes.push("end of chain".into()),
        _ => {}
    }
    vec![
        format!("{mark} {}", manifest.name),
        row.kind.to_string(),
        size(manifest.stored_size()),
        notes.join(", "),
    ]
}

fn paint(out: &Out, line: &str, manifest: Option<&Manifest>) -> String {
    match manifest {
        None => out.paint(Colour::Dim, line),
        Some(m) => match (m.state, m.validation, m.compression) {
            (BackupState::Error | BackupState::Failed, ..) | (_, ValidationState::NotValid, _) => {
                out.paint(Colour::Red, line)
            }
            (.., CompressionState::CompressionError) => out.paint(Colour::Yellow, line),
            (_, ValidationState::Valid, _) => out.paint(Colour::Green, line),
            _ => line.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::layout_fixtures::{manifest, store_with_vm};
    use crate::store::manifest::{Kind, Parent};
    use crate::store::vm::Current;

    #[test]
    fn a_chain_is_drawn_with_kinds_sizes_and_states() {
        let (_dir, store, name) = store_with_vm();
        let mut vm = store.vm(&name).unwrap();
        let mut last: Option<Parent> = None;
        for day in 1..=4 {
            let mut backup = manifest(&vm, &format!("2026-01-0{day}T00:00:00Z"), day);
            let staging = store.stage(&name, backup.id).unwrap();
            if let Some(parent) = last {
                backup.parent = Some(parent);
                backup.disks[0].kind = Kind::Incremental;
                backup.disks[0].depth = day as u32;
                backup.disks[0].file_size = 64 << 10;
            }
            backup.state = if day == 2 { BackupState::Removed } else { backup.state };
            backup.compression = if day == 3 { CompressionState::Compressed } else { backup.compression };
            last = Some(Parent { id: backup.id, name: staging.publish(&store, &mut backup).unwrap() });
        }
        let last = last.unwrap();
        vm.tracking.current = Some(Current { id: last.id, name: last.name });
        store.save_vm(&vm).unwrap();
        let listed = look(&store, name.clone(), true).unwrap();
        let out = Out::new(true);
        let drawn = "\
web1  1 disk file, tracked by scan; 3 backups, 4.2 MiB
  ● 2026-01-01T00-00-00Z    full         4.0 MiB
  ├─┊ 1 removed, kept
  ├─● 2026-01-03T00-00-00Z  incremental  64 KiB   Compressed
  ╰─● 2026-01-04T00-00-00Z  incremental  64 KiB   current
";
        assert_eq!(draw(&out, &listed), drawn);

        // A damaged manifest is shown, and hides no other.
        std::fs::write(store.manifest_path(&name, &"2026-01-03T00-00-00Z".parse().unwrap()), "{").unwrap();
        let drawn = draw(&out, &look(&store, name, true).unwrap());
        assert!(
            drawn.contains("✗ 2026-01-03T00-00-00Z") && drawn.contains("2026-01-04T00-00-00Z"),
            "{drawn}"
        );
    }
}
