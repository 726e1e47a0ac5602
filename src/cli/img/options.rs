//! Options as GNU getopt reads them: bundled letters, long names that may be cut short, options after file names, `--`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use super::Failure;

/// One option of a command.
#[derive(Debug)]
pub struct Opt {
    /// Its letter.
    pub short: Option<char>,
    /// Its long name, by which the command asks for it.
    pub long: &'static str,
    /// What its value is called in the help; `None` for a flag.
    pub value: Option<&'static str>,
    /// What it does.
    pub help: &'static str,
}

/// A flag.
pub const fn flag(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { short: Some(short), long, value: None, help }
}

/// An option with a value.
pub const fn value(short: char, long: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { short: Some(short), long, value: Some(value), help }
}

/// A flag without a letter.
pub const fn long_flag(long: &'static str, help: &'static str) -> Opt {
    Opt { short: None, long, value: None, help }
}

/// An option with a value and without a letter.
pub const fn long_value(long: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { short: None, long, value: Some(value), help }
}

/// What was given on a command's line.
#[derive(Debug, Default)]
pub struct Given {
    options: Vec<(&'static str, OsString)>,
    /// The words that are no options, in order.
    pub words: Vec<OsString>,
}

impl Given {
    /// Sorts `arguments` into options and words; if `sized`, `-` and a digit right behind a word is a word too: a size to
    /// take off.
    pub fn parse(options: &[&'static [Opt]], arguments: &[OsString], sized: bool) -> Result<Self, Failure> {
        let mut given = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let bytes = argument.as_bytes();
            if bytes == b"--" {
                given.words.extend(arguments.cloned());
                break;
            } else if let Some(long) = bytes.strip_prefix(b"--") {
                given.long(options, long, &mut arguments)?;
            } else if bytes.len() > 1 && bytes.starts_with(b"-") {
                given.letters(options, &bytes[1..], &mut arguments)?;
            } else {
                given.words.push(argument.clone());
                let next = arguments.as_slice().first().filter(|_| sized);
                if next.is_some_and(|n| matches!(n.as_bytes(), [b'-', digit, ..] if digit.is_ascii_digit())) {
                    given.words.extend(arguments.next().cloned());
                }
            }
        }
        Ok(given)
    }

    fn long<'a>(
        &mut self,
        options: &[&'static [Opt]],
        text: &[u8],
        rest: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<(), Failure> {
        let (name, inline) = match text.iter().position(|b| *b == b'=') {
            Some(at) => (&text[..at], Some(OsString::from_vec(text[at + 1..].to_vec()))),
            None => (text, None),
        };
        let shown = String::from_utf8_lossy(name).into_owned();
        let all = || options.iter().flat_map(|o| o.iter());
        let exact = all().find(|o| o.long.as_bytes() == name);
        let option = match exact {
            Some(option) => option,
            None => {
                let mut found = all().filter(|o| o.long.as_bytes().starts_with(name));
                let first =
                    found.next().ok_or_else(|| Failure::usage(format!("unrecognized option '--{shown}'")))?;
                if let Some(other) = found.next() {
                    return Err(Failure::usage(format!(
                        "option '--{shown}' is ambiguous: it may be '--{}' or '--{}'",
                        first.long, other.long
                    )));
                }
                first
            }
        };
        let value = match (option.value, inline) {
            (None, None) => OsString::new(),
            (None, Some(_)) => {
                return Err(Failure::usage(format!("option '--{}' does not allow an argument", option.long)));
            }
            (Some(_), Some(value)) => value,
            (Some(_), None) => rest
                .next()
                .cloned()
                .ok_or_else(|| Failure::usage(format!("option '--{}' requires an argument", option.long)))?,
        };
        self.options.push((option.long, value));
        Ok(())
    }

    fn letters<'a>(
        &mut self,
        options: &[&'static [Opt]],
        letters: &[u8],
        rest: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<(), Failure> {
        for (at, letter) in letters.iter().enumerate() {
            let letter = char::from(*letter);
            let option = options
                .iter()
                .flat_map(|o| o.iter())
                .find(|o| o.short == Some(letter))
                .ok_or_else(|| Failure::usage(format!("invalid option -- '{letter}'")))?;
            if option.value.is_none() {
                self.options.push((option.long, OsString::new()));
                continue;
            }
            let value = if at + 1 < letters.len() {
                OsString::from_vec(letters[at + 1..].to_vec())
            } else {
                rest.next()
                    .cloned()
                    .ok_or_else(|| Failure::usage(format!("option requires an argument -- '{letter}'")))?
            };
            self.options.push((option.long, value));
            break;
        }
        Ok(())
    }

    /// Adds an option, as if it had been given last.
    pub fn set(&mut self, long: &'static str, value: OsString) {
        self.options.push((long, value));
    }

    /// Whether the option was given.
    pub fn has(&self, long: &str) -> bool {
        self.options.iter().any(|(name, _)| *name == long)
    }

    /// The value given last.
    pub fn last(&self, long: &str) -> Option<&OsStr> {
        self.options.iter().rev().find(|(name, _)| *name == long).map(|(_, value)| value.as_os_str())
    }

    /// The value given last, as text.
    pub fn text(&self, long: &str) -> Result<Option<&str>, Failure> {
        self.last(long)
            .map(|v| v.to_str().ok_or_else(|| Failure::new(format!("the value of --{long} is not UTF-8"))))
            .transpose()
    }

    /// All values, in order, as text.
    pub fn texts(&self, long: &str) -> Result<Vec<&str>, Failure> {
        Ok(self.in_order(&[long])?.into_iter().map(|(_, v)| v).collect())
    }

    /// Those of the options that were given, in order, each with its value.
    pub fn in_order(&self, longs: &[&str]) -> Result<Vec<(&'static str, &str)>, Failure> {
        let of = self.options.iter().filter(|(name, _)| longs.contains(name));
        of.map(|(name, v)| {
            let text = v.to_str();
            text.map(|v| (*name, v))
                .ok_or_else(|| Failure::new(format!("the value of --{name} is not UTF-8")))
        })
        .collect()
    }

    /// The only word, or the message that one is needed.
    pub fn one_name(&self) -> Result<&OsStr, Failure> {
        match self.words.as_slice() {
            [name] => Ok(name),
            _ => Err(Failure::usage("Expecting one image file name")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] =
        &[flag('p', "progress", ""), value('f', "format", "FMT", ""), long_value("output", "OFMT", "")];

    fn parse(words: &[&str]) -> Result<Given, Failure> {
        Given::parse(&[OPTIONS], &words.iter().map(OsString::from).collect::<Vec<_>>(), false)
    }

    #[test]
    fn letters_bundle_values_stick_and_words_may_stand_anywhere() {
        let given = parse(&["a", "-pfqcow2", "b", "--outp=json", "--", "-p"]).unwrap();
        assert!(given.has("progress"));
        assert_eq!(given.text("format").unwrap(), Some("qcow2"));
        assert_eq!(given.text("output").unwrap(), Some("json"));
        assert_eq!(given.words, ["a", "b", "-p"]);
    }

    #[test]
    fn a_size_to_take_off_stands_right_behind_a_word() {
        let parse = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            Given::parse(&[OPTIONS], &words, true)
        };
        assert_eq!(parse(&["a", "-1M", "-p"]).unwrap().words, ["a", "-1M"]);
        assert_eq!(parse(&["-p", "--", "a", "-1M"]).unwrap().words, ["a", "-1M"]);
        for words in [&["a", "-p", "-1M"][..], &["-1M", "a"], &["-f", "raw", "-1M", "a"], &["a", "-x"]] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn the_last_value_counts() {
        assert_eq!(
            parse(&["-f", "raw", "--format", "qcow2"]).unwrap().text("format").unwrap(),
            Some("qcow2")
        );
    }

    #[test]
    fn what_is_unknown_or_lacks_its_value_is_named() {
        for (words, says) in [
            (&["-x"][..], "invalid option -- 'x'"),
            (&["-1"], "invalid option -- '1'"),
            (&["--nope"], "unrecognized option '--nope'"),
            (&["-f"], "option requires an argument -- 'f'"),
            (&["--output"], "option '--output' requires an argument"),
            (&["--progress=1"], "option '--progress' does not allow an argument"),
        ] {
            assert_eq!(parse(words).unwrap_err().text, says, "{words:?}");
        }
    }
}
