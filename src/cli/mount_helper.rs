//! `mount.fuse.knibfs STORE MNT -o OPTIONS`: what mount(8) and a line in fstab call. A link of that name to this program
//! is all that is needed.

use std::ffi::{OsStr, OsString};
use std::path::Path;

const NAME: &str = "mount.fuse.knibfs";
/// Options of `knibfs mount` that take a value.
const VALUES: [&str; 6] = ["uid", "gid", "mode", "cache-size", "threads", "log-dir"];
/// Those that take none.
const FLAGS: [&str; 2] = ["allow-other", "passthrough"];
/// What mount(8) passes on, and what fstab lines hold for others to read. The mount is `ro,nosuid,nodev,noexec` always.
const IGNORED: [&str; 27] = [
    "defaults",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "_netdev",
    "nofail",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "diratime",
    "nodiratime",
];

/// The command line that is meant, when the program was called by the helper's name. The error is for people.
pub fn called(line: &[OsString]) -> Option<Result<Vec<OsString>, String>> {
    let (program, rest) = line.split_first()?;
    (Path::new(program).file_name() == Some(OsStr::new(NAME))).then(|| translate(rest))
}

fn translate(rest: &[OsString]) -> Result<Vec<OsString>, String> {
    let mut places = Vec::new();
    let mut options: Vec<OsString> = Vec::new();
    let mut words = rest.iter();
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("-o") => {
                let list = words.next().and_then(|l| l.to_str()).ok_or("-o wants options")?;
                for option in list.split(',').filter(|o| !o.is_empty()) {
                    options.extend(one(option)?);
                }
            }
            // A type, or a namespace.
            Some("-t" | "-N") => {
                words.next();
            }
            Some(flag) if flag.len() > 1 && flag.starts_with('-') => {
                if !flag.bytes().skip(1).all(|b| b"snv".contains(&b)) {
                    return Err(format!("{flag} is not known"));
                }
            }
            _ => places.push(word.clone()),
        }
    }
    let [store, mount_point] =
        <[OsString; 2]>::try_from(places).map_err(|_| format!("usage: {NAME} STORE MNT [-o OPTIONS]"))?;
    let mut line: Vec<OsString> = vec!["knibfs".into(), "--store".into(), store, "mount".into()];
    line.extend(options);
    line.extend(["--".into(), mount_point]);
    Ok(line)
}

fn one(option: &str) -> Result<Option<OsString>, String> {
    let (name, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(v)));
    let name = name.replace('_', "-");
    match value {
        _ if option.starts_with("x-") || option.starts_with("X-") || name == "comment" => Ok(None),
        None if FLAGS.contains(&name.as_str()) => Ok(Some(format!("--{name}").into())),
        None if IGNORED.contains(&option) => Ok(None),
        Some(value) if VALUES.contains(&name.as_str()) => Ok(Some(format!("--{name}={value}").into())),
        _ => {
            let (flags, values) = (FLAGS.join(", "), VALUES.join("=…, "));
            Err(format!("the option {option} is not known: {flags}, {values}=… are"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(words: &str) -> Option<Result<Vec<String>, String>> {
        let line: Vec<OsString> = words.split(' ').map(Into::into).collect();
        let strings = |line: Vec<OsString>| line.into_iter().map(|w| w.into_string().unwrap()).collect();
        called(&line).map(|r| r.map(strings))
    }

    #[test]
    fn what_mount_and_fstab_say_becomes_a_command_line() {
        assert_eq!(said("/usr/bin/knibfs mount /mnt"), None);
        let line = said(
            "/sbin/mount.fuse.knibfs /store /mnt -sv -t fuse.knibfs -o rw,nofail,x-systemd.automount,allow_other,cache_size=1G,uid=5,passthrough",
        );
        let wanted =
            "knibfs --store /store mount --allow-other --cache-size=1G --uid=5 --passthrough -- /mnt";
        assert_eq!(line.unwrap().unwrap().join(" "), wanted);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for words in [
            "/store",
            "/s /m /x",
            "/s /m -o",
            "/s /m -o nonsense",
            "/s /m -o serve-for-parent=1",
            "/s /m -o passthrough=1",
            "/s /m -q",
        ] {
            let refusal = said(&format!("mount.fuse.knibfs {words}")).unwrap().unwrap_err();
            assert!(!refusal.is_empty(), "{words}");
        }
    }
}
