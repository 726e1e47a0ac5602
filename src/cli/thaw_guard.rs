//! The hidden command of the helper that thaws.

use std::time::Duration;

use super::Outcome;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The host, as a libvirt URI.
    #[arg(long)]
    uri: String,
    /// The domain's UUID.
    #[arg(long)]
    domain: String,
    /// Thaw after so many seconds whatever happens.
    #[arg(long)]
    seconds: u64,
}

pub fn run(args: &Args) -> Outcome {
    crate::hypervisor::thaw_guard::run(&args.uri, &args.domain, Duration::from_secs(args.seconds))?;
    Ok(())
}
