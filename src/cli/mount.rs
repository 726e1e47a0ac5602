//! `mount` and `umount`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};

use knib_fuse::Tree;

use super::{Context, Failure, Outcome};
use crate::mount::{
    Access, Kept, MountPoint, StoreTree, TreeConfig, hypervisor_access, keep, serve_kept, unmount_unless_busy,
};
use crate::store::Store;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder to mount at.
    #[arg(value_name = "MNT")]
    mount_point: PathBuf,

    /// Stay in the foreground.
    #[arg(short = 'f', long)]
    foreground: bool,

    /// Let other users in: by default root and the user that libvirt runs QEMU as. It shows every guest's disks to them;
    /// --uid, --gid and --mode say whom and what. On SELinux hosts QEMU also needs `setsebool -P virt_use_fusefs on`.
    #[arg(long)]
    allow_other: bool,

    /// Owner of all files, as a number.
    #[arg(long)]
    uid: Option<u32>,

    /// Group of all files, as a number.
    #[arg(long)]
    gid: Option<u32>,

    /// Permission bits of all files, in octal (440). Nothing is ever writable.
    #[arg(long, value_parser = octal)]
    mode: Option<u16>,

    /// Decoded clusters that are kept in memory, shared by all readers, in bytes or with K, M or G (powers of 1024).
    /// The program takes up to 64 MiB more.
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = bytes)]
    cache_size: u64,

    /// Threads that answer requests, 1 to 32; most of them wait for disks [default: one a core, at least 16, at most 32].
    #[arg(long, value_parser = thread_count)]
    threads: Option<u16>,

    /// Folder of the log when not in the foreground [default: /var/log/knibfs, or .local/state/knibfs at home].
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,

    /// Keep the mount, and say on standard output when it can be used.
    #[arg(long, hide = true)]
    keep_for_parent: bool,

    /// Serve the mount whose keeper is at standard input; the number of servers that it had before.
    #[arg(long, hide = true, value_name = "N")]
    serve_for_keeper: Option<u64>,

    /// Have the kernel read stored files (`<disk>.qcow2`) by itself: at the disk's speed, and unchecked. For the option
    /// `passthrough` of mount(8) and fstab.
    #[arg(long, hide = true)]
    passthrough: bool,

    /// Do as if the kernel could not hand requests out again when the server dies (before Linux 6.9).
    #[arg(long, hide = true)]
    no_resend: bool,
}

#[derive(Debug, clap::Args)]
pub struct UmountArgs {
    /// Folder that a store is mounted at.
    #[arg(value_name = "MNT")]
    mount_point: PathBuf,
}

/// Settings of the C library: few parts of the heap, and long buffers are given back when they are freed. What is needed often
/// is used again and not freed.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "131072")];

/// Each thread has a buffer of up to a megabyte and a decoder: what the mount takes beside its cache is promised for so many.
const MOST_THREADS: u16 = 32;

/// What the child says when the mount can be used.
const READY: &str = "ready";

pub fn run(context: &Context, args: &Args) -> Outcome {
    if let Some(restarts) = args.serve_for_keeper {
        let tree = || {
            let store = context.open_store().map_err(|failure| match failure {
                Failure::Usage(why) => anyhow!(why),
                Failure::Failed(error) => error,
            })?;
            tree(store, args, restarts)
        };
        serve_kept(tree, &args.mount_point, threads(args), args.allow_other)?;
        return Ok(());
    }
    let store = context.open_store()?;
    let place = MountPoint::check(&args.mount_point, store.root())?;
    if args.keep_for_parent {
        return keep_for_parent(&store, &place, args);
    }
    if args.foreground {
        let ready = || {
            // The mount is as good without it; who waits for it must know why in vain.
            if let Err(error) = super::systemd::ready() {
                tracing::warn!("cannot tell systemd (NOTIFY_SOCKET) that the mount is ready: {error}");
            }
            Ok(())
        };
        keep_mount(&store, &place, args, ready)?;
        return Ok(());
    }
    start_in_background(&store, &place, args)?;
    Ok(())
}

pub fn run_umount(args: &UmountArgs) -> Outcome {
    unmount_unless_busy(&args.mount_point)?;
    Ok(())
}

fn tree(store: Store, args: &Args, restarts: u64) -> anyhow::Result<Arc<dyn Tree>> {
    let config = TreeConfig {
        access: access(args),
        cache_size: usize::try_from(args.cache_size).unwrap_or(usize::MAX),
        mounted_at: args.mount_point.display().to_string(),
        held_by: std::os::unix::process::parent_id(),
        restarts,
        passthrough: args.passthrough,
    };
    Ok(Arc::new(StoreTree::new(store, config).context("cannot start the mount's threads")?))
}

fn keep_mount(
    store: &Store,
    place: &MountPoint,
    args: &Args,
    ready: impl FnOnce() -> io::Result<()>,
) -> anyhow::Result<()> {
    // The path as it is now: behind it lies the next version when this one is replaced.
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let server = |restarts: u64| {
        let mut command = mount_command(&program, store, place, args);
        command.arg(format!("--serve-for-keeper={restarts}"));
        // The C library keeps what is freed for later, in a part of the heap for each thread, and the longer the buffers
        // are the more of it: that adds up to more memory than the mount promises to keep to.
        for (name, value) in ALLOCATOR.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()) {
            command.env(name, value);
        }
        command
    };
    keep(Kept { place, allow_other: args.allow_other, resend: !args.no_resend, server: &server }, ready)
}

/// This program again, to mount the same in the same way.
fn mount_command(program: &Path, store: &Store, place: &MountPoint, args: &Args) -> Command {
    let mut command = Command::new(program);
    command.arg("--store").arg(store.root()).arg("mount").arg(place.path());
    for (flag, given) in [
        ("--allow-other", args.allow_other),
        ("--passthrough", args.passthrough),
        ("--no-resend", args.no_resend),
    ] {
        command.args(given.then_some(flag));
    }
    let options = [
        ("--uid", args.uid.map(|v| v.to_string())),
        ("--gid", args.gid.map(|v| v.to_string())),
        ("--mode", args.mode.map(|v| format!("{v:o}"))),
        ("--cache-size", Some(args.cache_size.to_string())),
        ("--threads", args.threads.map(|v| v.to_string())),
    ];
    for (name, value) in options {
        if let Some(value) = value {
            command.arg(format!("{name}={value}"));
        }
    }
    command
}

fn threads(args: &Args) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // More than cores: most wait for the disk, and a disk is as fast as it is asked for much at once.
    args.threads.map_or(cores.clamp(16, usize::from(MOST_THREADS)), usize::from)
}

fn access(args: &Args) -> Access {
    let by_default = if args.allow_other {
        hypervisor_access().unwrap_or_else(|| {
            if args.uid.is_none() && args.gid.is_none() && args.mode.is_none() {
                tracing::warn!(
                    "there is no user that libvirt runs QEMU as: only root may read; see --uid, --gid, --mode"
                );
            }
            Access::only_me()
        })
    } else {
        Access::only_me()
    };
    Access {
        uid: args.uid.unwrap_or(by_default.uid),
        gid: args.gid.unwrap_or(by_default.gid),
        mode: args.mode.unwrap_or(by_default.mode),
    }
}

/// Starts this program again to keep the mount, and returns when the mount can be used. (Forking a program that has threads is
/// not safe; starting it anew is.)
fn start_in_background(store: &Store, place: &MountPoint, args: &Args) -> anyhow::Result<()> {
    let (log, log_path) = open_log(args.log_dir.as_deref(), store)?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = mount_command(&program, store, place, args);
    command.arg("--keep-for-parent");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::from(log));
    // It must not keep a folder busy that someone wants to unmount.
    command.current_dir("/");
    let mut child = command.spawn().context("cannot start the program that keeps the mount")?;
    let mut answer = String::new();
    if let Some(pipe) = child.stdout.take() {
        io::BufReader::new(pipe)
            .read_line(&mut answer)
            .context("cannot hear from the program that keeps the mount")?;
    }
    match answer.trim_end() {
        READY => Ok(()),
        "" => {
            let status = child.wait().context("cannot wait for the program that keeps the mount")?;
            Err(anyhow!("the program that keeps the mount ended ({status}): see {}", log_path.display()))
        }
        why => {
            let _ = child.wait();
            Err(anyhow!("{why}"))
        }
    }
}

fn keep_for_parent(store: &Store, place: &MountPoint, args: &Args) -> Outcome {
    // No terminal may end it.
    let _ = rustix::process::setsid();
    let say = |line: &str| -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", line.replace('\n', " "))?;
        out.flush()
    };
    keep_mount(store, place, args, || say(READY)).map_err(|error| {
        let _ = say(&super::with_causes(&error));
        Failure::Failed(error)
    })
}

fn open_log(dir: Option<&Path>, store: &Store) -> anyhow::Result<(File, PathBuf)> {
    let dir = match dir {
        Some(dir) => dir.to_path_buf(),
        None if rustix::process::geteuid().is_root() => "/var/log/knibfs".into(),
        None => std::env::home_dir().unwrap_or_else(|| "/tmp".into()).join(".local/state/knibfs"),
    };
    let path = dir.join(format!("mount-{}.log", store.id()));
    let file = fs::create_dir_all(&dir)
        .and_then(|()| OpenOptions::new().create(true).append(true).open(&path))
        .with_context(|| {
            format!("cannot write the log {}: name another folder with --log-dir", path.display())
        })?;
    Ok((file, path))
}

fn thread_count(text: &str) -> Result<u16, String> {
    let wrong = || {
        format!(
            "give 1 to {MOST_THREADS}: more would take more memory than the mount promises to keep to, beside --cache-size"
        )
    };
    text.parse().ok().filter(|n| (1..=MOST_THREADS).contains(n)).ok_or_else(wrong)
}

fn octal(text: &str) -> Result<u16, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    u16::from_str_radix(digits, 8)
        .ok()
        .filter(|m| *m <= 0o777)
        .ok_or_else(|| "give three octal digits, like 440".into())
}

/// `64M`, `64MiB`, `1G`, `67108864`.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1u64 << 30,
        _ => return Err("give bytes, or a number with K, M or G".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "give bytes, or a number with K, M or G".to_owned())?;
    number
        .checked_mul(factor)
        .filter(|n| *n <= 1 << 46)
        .ok_or_else(|| "that is more than any machine has".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_modes_are_read_as_people_write_them() {
        assert_eq!(bytes("256M"), Ok(256 << 20));
        for (text, wanted) in [("0", 0), ("5", 5), ("4k", 4096), ("2GiB", 2 << 30), ("1MiB", 1 << 20)] {
            assert_eq!(bytes(text), Ok(wanted), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1 T", "99999999999G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!((octal("440"), octal("0444")), (Ok(0o440), Ok(0o444)));
        assert!(octal("888").is_err() && octal("7777").is_err());
    }
}
