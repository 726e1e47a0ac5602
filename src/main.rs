//! The `knibfs` program: parse, dispatch, exit code; nothing else.

fn main() -> std::process::ExitCode {
    knibfs::cli::run()
}
