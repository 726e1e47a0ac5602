//! The process that serves a mount: started by the mount's keeper, and by the next keeper of none.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use knib_fuse::{Link, OpenFiles, PROTOCOL, Server, Stopper, ToKeeper, ToServer, Tree};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::life::{describe, raise_limit_of_open_files};

/// Serves the mount whose keeper is at the other end of standard input, until the mount ends.
pub fn serve_kept(
    tree: impl FnOnce() -> anyhow::Result<Arc<dyn Tree>>,
    mount_point: &Path,
    threads: usize,
    allow_other: bool,
) -> anyhow::Result<()> {
    raise_limit_of_open_files();
    // While there is a keeper, it takes the signals: a terminal or `systemctl stop` sends them to both.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let keeper = Arc::new(Link::from_stdin()?);
    let tree = tree().inspect_err(|error| {
        keeper.tell(&ToKeeper::Failed { why: format!("{error:#}") }, None);
    })?;
    let version = env!("CARGO_PKG_VERSION").into();
    keeper.send(&ToKeeper::Prepared { protocol: PROTOCOL, version }, None)?;
    let server = Server::take_over(tree, keeper.clone(), allow_other, threads)?;
    let orphan = Arc::new(AtomicBool::new(false));
    {
        let (orphan, files, place) = (orphan.clone(), server.open_files(), mount_point.to_path_buf());
        std::thread::Builder::new().name("keeper".into()).spawn(move || {
            // Until its end.
            while let Ok(Some((message, _))) = keeper.receive::<ToServer>() {
                match message {
                    ToServer::Ping => keeper.tell(&ToKeeper::Pong, None),
                    ToServer::Backed { handle, backing } => files.backed(handle, backing),
                    _ => {}
                }
            }
            files.keeper_is_gone();
            orphan.store(true, Ordering::Relaxed);
            tracing::error!(
                "the keeper of the mount at {} is gone: pid {} goes on serving, and no other follows it; mount again when nothing uses it",
                place.display(),
                std::process::id()
            );
        })?;
    }
    let (files, place) = (server.open_files(), mount_point.to_path_buf());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || end_on_signals(signals, &orphan, &files, &place))?;
    server.run()?;
    Ok(())
}

/// Without a keeper: the first signal ends the mount when nobody uses it, the second does so under them, the third ends the
/// program.
fn end_on_signals(mut signals: Signals, orphan: &AtomicBool, files: &Arc<OpenFiles>, place: &Path) {
    let detach = |stopper: &Stopper| {
        if let Err(error) = stopper.detach() {
            tracing::error!("cannot unmount: {error}");
        }
    };
    let stopper = Stopper::of(place);
    let mut count = 0;
    for _ in signals.forever() {
        if !orphan.load(Ordering::Relaxed) {
            continue;
        }
        count += 1;
        match count {
            1 if files.is_empty() => detach(&stopper),
            1 => {
                tracing::warn!("{}", in_use(place, files.holders().iter().map(|h| h.pid)));
                let (files, stopper) = (files.clone(), stopper.clone());
                let waiter = std::thread::Builder::new().name("waiter".into()).spawn(move || {
                    while !files.is_empty() {
                        files.wait_for_close(Duration::from_secs(1));
                    }
                    let _ = stopper.detach();
                });
                if let Err(error) = waiter {
                    tracing::error!("cannot wait for files to be closed: {error}");
                }
            }
            2 => detach(&stopper),
            _ => std::process::exit(1),
        }
    }
}

/// What is said when a mount that is in use is to end.
pub(super) fn in_use(place: &Path, pids: impl Iterator<Item = u32>) -> String {
    let pids: Vec<u32> = pids.collect::<BTreeSet<_>>().into_iter().collect();
    format!(
        "{} is in use by {}: it is unmounted when they have closed their files, or at once on the next signal",
        place.display(),
        describe(&pids)
    )
}
