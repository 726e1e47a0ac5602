//! `knibfs host`.

use super::output::table;
use super::{Context, Outcome};
use crate::store::Host;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Name a host that quick restores may start VMs on.
    Add {
        /// Its name.
        name: String,
        /// Its libvirt: of this machine, like qemu:///system or qemu+unix:///system?socket=PATH.
        #[arg(long)]
        uri: String,
        /// The zone that it is in.
        #[arg(long)]
        zone: Option<String>,
    },
    /// List the hosts.
    List,
    /// Forget a host. Its VMs stay.
    Remove {
        /// Its name.
        name: String,
    },
}

pub fn run(context: &Context, command: Command) -> Outcome {
    let store = context.open_store()?;
    match command {
        Command::Add { name, uri, zone } => {
            let host = Host { name, uri, zone };
            store.add_host(host.clone())?;
            context.out.print(&host, || host.name.clone())?;
        }
        Command::List => {
            let hosts = store.hosts()?;
            context.out.print(&hosts, || {
                let row = |h: &Host| vec![h.name.clone(), h.uri.clone(), h.zone.clone().unwrap_or_default()];
                table(&hosts.iter().map(row).collect::<Vec<_>>()).join("\n")
            })?;
        }
        Command::Remove { name } => {
            let host = store.remove_host(&name)?;
            context.out.print(&host, || host.name.clone())?;
        }
    }
    Ok(())
}
