//! The command line: parses, talks, shows progress, formats. Decides nothing.

mod backup;
mod check;
mod compress;
mod export;
mod host;
mod img;
mod init;
mod list;
mod mount;
mod mount_helper;
mod offering;
mod operation;
mod output;
mod progress;
mod prune;
mod recover;
mod remove;
mod restore;
mod setting;
mod show;
mod signals;
mod snapshot;
mod systemd;
#[cfg(feature = "libvirt")]
mod thaw_guard;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::store::Store;
use output::Out;

/// Native incremental backups of KVM guests, in a store of plain qcow2 files that mounts as a filesystem.
#[derive(Debug, Parser)]
#[command(name = "knibfs", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    /// Folder of the store.
    #[arg(short = 's', long = "store", env = "KNIBFS_STORE", global = true, value_name = "STORE")]
    store: Option<PathBuf>,

    /// Print the result as JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a store in a new or empty folder.
    Init(init::Args),
    /// Named sets of options that VMs are assigned to.
    #[command(subcommand)]
    Offering(offering::Command),
    /// Settings of the store.
    #[command(subcommand)]
    Setting(setting::Command),
    /// The VMs that the store knows.
    #[command(subcommand)]
    Vm(vm::Command),
    /// Take a backup of a VM; prints its name.
    Backup(backup::Args),
    /// Restore all volumes of a backup to the VM that it is of.
    Restore(restore::RestoreArgs),
    /// Restore one disk of a backup as a new volume of a VM.
    RestoreVolume(restore::VolumeArgs),
    /// Make a new VM of a backup.
    CreateVm(restore::CreateArgs),
    /// Snapshots of a VM's disks, on primary.
    #[command(subcommand)]
    VmSnapshot(snapshot::VmCommand),
    /// Snapshots of one disk of a VM, on primary.
    #[command(subcommand)]
    VolumeSnapshot(snapshot::VolumeCommand),
    /// The hosts that quick restores may start VMs on.
    #[command(subcommand)]
    Host(host::Command),
    /// Finish or undo what a crash interrupted.
    Recover,
    /// List backups, and draw how they stand on each other.
    List(list::Args),
    /// Show all that is known of one backup.
    Show(show::Args),
    /// Write a disk of a backup to a file of its own.
    Export(export::Args),
    /// Check that backups can be read, and are as they were written.
    Check(check::Args),
    /// Remove backups: any set, in any order.
    Remove(remove::Args),
    /// Remove the backups that no rule keeps, and merge what others stand on into them.
    Prune(prune::Args),
    /// Compress a stored backup.
    Compress(compress::Args),
    /// Work on raw and qcow2 images, as qemu-img does.
    Img(img::Args),
    /// Mount the store as a read-only file system.
    Mount(mount::Args),
    /// Unmount a store, unless it is in use.
    Umount(mount::UmountArgs),
    /// Thaw a guest should the knibfs that started this be killed.
    #[cfg(feature = "libvirt")]
    #[command(name = crate::hypervisor::thaw_guard::COMMAND, hide = true)]
    ThawGuard(thaw_guard::Args),
}

/// How a command ends when it does not succeed.
#[derive(Debug)]
enum Failure {
    /// The command line makes no sense: exit 2.
    Usage(String),
    /// It could not be done: exit 1.
    Failed(anyhow::Error),
}

type Outcome = Result<(), Failure>;

/// The error with those of its causes that it does not tell itself.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What every command gets.
struct Context {
    store: Option<PathBuf>,
    out: Out,
}

impl Context {
    /// The store that was named.
    fn open_store(&self) -> Result<Store, Failure> {
        let path = self.store.as_deref().ok_or_else(|| {
            Failure::Usage("no store was named: use `-s STORE` or set KNIBFS_STORE to its folder".into())
        })?;
        let store = Store::open(path)?;
        // Damaged settings are told by the command that needs them.
        if let Ok(settings) = store.settings() {
            crate::hypervisor::limit::set(std::time::Duration::from_secs(settings.timeout()));
        }
        Ok(store)
    }
}

/// Runs the program.
pub fn run() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    if let Some(code) = img::called(&line) {
        return code;
    }
    let line = match mount_helper::called(&line) {
        None => line,
        Some(Ok(line)) => line,
        Some(Err(message)) => {
            eprintln!("knibfs: {message}");
            return ExitCode::from(1);
        }
    };
    // Wrong usage ends here, with exit code 2 and clap's own help.
    let cli = Cli::parse_from(line);
    start_log();
    let context = Context { store: cli.store, out: Out::new(cli.json) };
    if let Command::Img(args) = &cli.command {
        return img::run(args);
    }
    match dispatch(&context, cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("knibfs: {message}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(error)) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            eprintln!("knibfs: {}", with_causes(&error));
            ExitCode::from(1)
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Outcome {
    match command {
        Command::Init(args) => init::run(context, &args),
        Command::Offering(command) => offering::run(context, command),
        Command::Setting(command) => setting::run(context, command),
        Command::Vm(command) => vm::run(context, command),
        Command::Backup(args) => backup::run(context, &args),
        Command::Restore(args) => restore::run(context, &args),
        Command::RestoreVolume(args) => restore::run_volume(context, &args),
        Command::CreateVm(args) => restore::run_create(context, &args),
        Command::VmSnapshot(command) => snapshot::run_vm(context, command),
        Command::VolumeSnapshot(command) => snapshot::run_volume(context, command),
        Command::Host(command) => host::run(context, command),
        Command::Recover => recover::run(context),
        Command::List(args) => list::run(context, &args),
        Command::Show(args) => show::run(context, &args),
        Command::Export(args) => export::run(context, &args),
        Command::Check(args) => check::run(context, &args),
        Command::Remove(args) => remove::run(context, &args),
        Command::Prune(args) => prune::run(context, &args),
        Command::Compress(args) => compress::run(context, &args),
        // Its exit codes are its own: it was run before.
        Command::Img(_) => Ok(()),
        Command::Mount(args) => mount::run(context, &args),
        Command::Umount(args) => mount::run_umount(&args),
        #[cfg(feature = "libvirt")]
        Command::ThawGuard(args) => thaw_guard::run(&args),
    }
}

/// Log lines go to standard error; `KNIBFS_LOG=debug` shows more.
fn start_log() {
    let level = std::env::var("KNIBFS_LOG").unwrap_or_else(|_| "warn".into());
    let (filter, wrong) = match tracing_subscriber::EnvFilter::try_new(level) {
        Ok(filter) => (filter, None),
        Err(wrong) => (tracing_subscriber::EnvFilter::new("warn"), Some(wrong)),
    };
    // A second start (in tests) is harmless.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
    if let Some(wrong) = wrong {
        tracing::warn!(
            "KNIBFS_LOG is not understood ({wrong}), warnings are shown; give error, warn, info, debug or trace"
        );
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let file = std::fs::File::open("/no/such/file").unwrap_err();
        let told = anyhow::Error::new(file).context("cannot read /no/such/file");
        assert_eq!(with_causes(&told), "cannot read /no/such/file: No such file or directory (os error 2)");
        let twice = told.context("cannot read /no/such/file: No such file or directory (os error 2)");
        assert_eq!(with_causes(&twice), "cannot read /no/such/file: No such file or directory (os error 2)");
    }

    #[test]
    fn the_store_may_be_named_before_or_after_the_command() {
        for line in [["knibfs", "-s", "/s", "list"], ["knibfs", "list", "-s", "/s"]] {
            assert_eq!(Cli::try_parse_from(line).unwrap().store, Some(PathBuf::from("/s")));
        }
    }
}
