//! `knibfs img`: the commands of `qemu-img` for raw and qcow2, with its options, output and exit codes. A link named
//! `qemu-img` to this program stands in for it.

mod amend;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod info;
mod json;
mod map;
mod measure;
mod named;
mod options;
mod progress;
mod rebase;
mod resize;
mod snapshot;

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use crate::img::Failure;
use options::{Given, Opt, flag, long_flag, long_value};

/// The version of `qemu-img` whose output this one gives.
const QEMU_VERSION: &str = "10.0.2";

/// What a command returns: its exit code.
type Done = Result<u8, Failure>;

/// One command.
struct Command {
    name: &'static str,
    about: &'static str,
    /// What follows the command's name, in the help.
    usage: &'static str,
    options: &'static [Opt],
    run: fn(&Given) -> Done,
}

const COMMANDS: &[Command] = &[
    amend::COMMAND,
    bitmap::COMMAND,
    check::COMMAND,
    commit::COMMAND,
    compare::COMMAND,
    convert::COMMAND,
    create::COMMAND,
    info::COMMAND,
    map::COMMAND,
    measure::COMMAND,
    rebase::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
];

/// What every command takes.
const COMMON: &[Opt] = &[
    flag('h', "help", "show this help"),
    long_flag("image-opts", "images are named so: driver=FMT,file.filename=FILE (not for create)"),
];
/// What every command knows; `named` and `refuse` say which of them take it.
const OTHERS: &[Opt] = &[long_value("object", "OBJDEF", ""), long_flag("target-image-opts", "")];

/// `knibfs img …` where other options of knibfs come first.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// The command and its options, as for qemu-img; `knibfs img --help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    rest: Vec<OsString>,
}

/// Runs the command line if it is one of ours: called as `qemu-img`, or with `img` as the first word.
pub fn called(line: &[OsString]) -> Option<ExitCode> {
    let (program, rest) = line.split_first()?;
    if Path::new(program).file_name() == Some(OsStr::new("qemu-img")) {
        return Some(main("qemu-img", rest));
    }
    match rest.split_first() {
        Some((first, rest)) if first == "img" => Some(main("knibfs img", rest)),
        _ => None,
    }
}

/// The same for what follows `img`.
pub fn run(args: &Args) -> ExitCode {
    main("knibfs img", &args.rest)
}

fn main(program: &str, line: &[OsString]) -> ExitCode {
    let failed = |command: Option<&str>, failure: &Failure| {
        // As getopt does, what it finds wrong is said by the command.
        eprintln!("{program}: {}", failure.text);
        if failure.usage {
            let command = command.map(|c| format!(" {c}")).unwrap_or_default();
            eprintln!("Try '{program}{command} --help' for more info");
        }
        ExitCode::from(failure.code)
    };
    let mut line = line.iter();
    let name = loop {
        let Some(word) = line.next() else {
            return failed(None, &Failure::usage("Not enough arguments"));
        };
        match word.to_str().unwrap_or("") {
            "-h" | "--help" => return finished(program, say(&help(program)).map(|()| 0)),
            "-V" | "--version" => {
                let own = env!("CARGO_PKG_VERSION");
                return finished(
                    program,
                    say(&format!("qemu-img version {QEMU_VERSION} (knibfs {own})\n")).map(|()| 0),
                );
            }
            // What would be traced is QEMU's.
            "-T" | "--trace" => {
                line.next();
            }
            trace if trace.starts_with("--trace=") => {}
            "--" => {}
            option if option.starts_with('-') => {
                return failed(None, &Failure::usage(format!("unrecognized option '{option}'")));
            }
            name => break name.to_owned(),
        }
    };
    let Some(command) = COMMANDS.iter().find(|c| c.name == name) else {
        return failed(None, &Failure::usage(format!("Command not found: {name}")));
    };
    let rest: Vec<OsString> = line.cloned().collect();
    let sized = command.name == resize::COMMAND.name;
    let parsed = Given::parse(&[command.options, COMMON, OTHERS], &rest, sized);
    let result = parsed.and_then(|mut given| {
        if given.has("help") {
            return say(&command_help(program, command)).map(|()| 0);
        }
        refuse(&given)?;
        named::resolve(command, &mut given)?;
        (command.run)(&given)
    });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failed(Some(command.name), &failure),
    }
}

fn finished(program: &str, done: Done) -> ExitCode {
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("{program}: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn refuse(given: &Given) -> Result<(), Failure> {
    if given.has("object") {
        return Err(Failure::new("--object (secrets, TLS) is not supported: images are opened by name only"));
    }
    Ok(())
}

/// Prints a result.
fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|e| Failure::new(format!("cannot write to standard output: {e}")))
}

/// Says something on standard error that does not end the work.
fn warn(text: &str) {
    eprintln!("{text}");
}

/// `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Human,
    Json,
}

impl Output {
    const OPTION: Opt = long_value("output", "human|json", "how the result is printed (human)");

    fn of(given: &Given) -> Result<Self, Failure> {
        match given.text("output")? {
            None | Some("human") => Ok(Output::Human),
            Some("json") => Ok(Output::Json),
            Some(other) => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"))),
        }
    }
}

/// Cache modes are read and checked: the page cache is used, and what is written is durable at the end.
fn check_cache(given: &Given, option: &str) -> Result<(), Failure> {
    match given.text(option)? {
        None | Some("none" | "off" | "writeback" | "writethrough" | "directsync" | "unsafe") => Ok(()),
        Some(other) => Err(Failure::new(format!("Invalid cache option: {other}"))),
    }
}

/// `-r`: bytes a second, `None` for no limit.
fn rate(given: &Given) -> Result<Option<u64>, Failure> {
    let Some(text) = given.text("rate")? else { return Ok(None) };
    let parsed = crate::img::size::parse(text);
    let rate = parsed.map_err(|_| Failure::new(format!("Invalid rate limit specified: '{text}'.")))?;
    Ok(Some(rate).filter(|r| *r > 0))
}

/// Worker threads: as many as there are processors, and at most so many as were asked for (`-m`, 8 if not).
fn threads(wanted: Option<usize>) -> usize {
    let there = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    there.min(wanted.unwrap_or(8)).max(1)
}

fn help(program: &str) -> String {
    let mut text = format!(
        "Works on disk images, raw and qcow2, as qemu-img {QEMU_VERSION} does: the same options, output and exit codes.\n\n\
         Usage: {program} COMMAND [OPTIONS] …\n\nCommands ({program} COMMAND --help tells more):\n"
    );
    for command in COMMANDS {
        text += &format!("  {:<9} {}\n", command.name, command.about);
    }
    text + "\nNot supported, and refused with a word: other formats, network protocols, encryption, --object.\n\
            Supported formats: raw qcow2\n"
}

fn command_help(program: &str, command: &Command) -> String {
    let mut text =
        format!("{}.\n\nUsage: {program} {} {}\n\nOptions:\n", command.about, command.name, command.usage);
    for option in command.options.iter().chain(COMMON) {
        let short = option.short.map(|c| format!("-{c}, ")).unwrap_or_else(|| "    ".to_owned());
        let value = option.value.map(|v| format!(" {v}")).unwrap_or_default();
        let left = format!("{short}--{}{value}", option.long);
        if left.len() <= 34 {
            text += &format!("  {left:<34} {}\n", option.help);
        } else {
            text += &format!("  {left}\n  {:<34} {}\n", "", option.help);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_names_of_options_are_used_once() {
        for command in COMMANDS {
            let all: Vec<&Opt> = command.options.iter().chain(COMMON).chain(OTHERS).collect();
            for (at, option) in all.iter().enumerate() {
                for other in &all[..at] {
                    assert_ne!(option.long, other.long, "{}", command.name);
                    assert!(
                        option.short.is_none() || option.short != other.short,
                        "{} -{:?}",
                        command.name,
                        option.short
                    );
                }
            }
        }
    }
}
