//! What definitions mean, and that a change of one changes nothing else. The fixtures are in `tests/fixtures/domain`.

use super::*;
use crate::hypervisor::NewOverlay;

const MANY: &str = include_str!("../../tests/fixtures/domain/many.xml");
const LIVE: &str = include_str!("../../tests/fixtures/domain/live.xml");

fn image(path: &str, format: ImageFormat) -> ImageRef {
    ImageRef { path: path.into(), format }
}

fn never_block(_: &Path) -> bool {
    false
}

fn dev_is_block(path: &Path) -> bool {
    path.starts_with("/dev")
}

fn disk(text: &str, target: &str) -> DiskXml {
    parse(text).unwrap().disks.into_iter().find(|d| d.target == target).unwrap()
}

/// The lines that differ, old and new.
fn changed<'a>(old: &'a str, new: &'a str) -> (Vec<&'a str>, Vec<&'a str>) {
    let same_before = old.lines().zip(new.lines()).take_while(|(a, b)| a == b).count();
    let rest = |text: &'a str| text.lines().skip(same_before).collect::<Vec<_>>();
    let (old, new) = (rest(old), rest(new));
    let same_after = old.iter().rev().zip(new.iter().rev()).take_while(|(a, b)| a == b).count();
    let cut = |mut lines: Vec<&'a str>| {
        lines.truncate(lines.len() - same_after);
        lines.into_iter().map(str::trim).collect::<Vec<_>>()
    };
    (cut(old), cut(new))
}

#[test]
fn a_definition_is_read() {
    let domain = parse(MANY).unwrap();
    assert_eq!(domain.name, "web & shop");
    assert_eq!(domain.uuid.unwrap().to_string(), "3b1f0c53-0f5a-4b7e-9d3c-6a1f2f6a9c11");
    assert_eq!(domain.nvram.as_deref(), Some(Path::new("/var/lib/libvirt/qemu/nvram/web_VARS.fd")));
    assert_eq!(domain.tpm, Some(TpmXml { source: None }));
    assert_eq!(domain.disks.len(), 15, "the disks in the metadata are none");
}

#[test]
fn a_chain_is_read_with_its_formats() {
    let vda = disk(MANY, "vda");
    assert_eq!(vda.source, DiskSource::File("/images/web & shop/root.qcow2".into()));
    assert_eq!(vda.driver_type.as_deref(), Some("qcow2"));
    assert_eq!(vda.serial.as_deref(), Some("ROOT-1"));
    assert!(vda.terminated);
    let layers: Vec<_> = vda.backing.iter().map(|b| (b.source.clone(), b.format.as_deref())).collect();
    assert_eq!(
        layers,
        [
            (DiskSource::File("/images/middle.qcow2".into()), Some("qcow2")),
            (DiskSource::Block("/dev/vg/template".into()), Some("raw")),
        ]
    );
}

#[test]
fn a_disk_that_says_nothing_of_its_chain_leaves_it_to_the_headers() {
    let vdc = disk(MANY, "vdc");
    assert_eq!((vdc.backing.len(), vdc.terminated, vdc.driver_type), (0, false, None));
    assert!(disk(MANY, "vdb").terminated, "an empty backingStore is an end");
    // libvirt's own persistent definitions leave out the last, empty one.
    let cut = MANY.replacen("          <backingStore/>\n", "", 1);
    let vda = disk(&cut, "vda");
    assert_eq!((vda.backing.len(), vda.terminated), (2, false));
}

#[test]
fn numbers_and_mirrors_of_a_live_disk_are_read() {
    let vda = disk(LIVE, "vda");
    assert_eq!(vda.index, Some(4));
    assert_eq!(vda.backing.iter().map(|b| b.index).collect::<Vec<_>>(), [Some(3), Some(1)]);
    let mirror =
        MirrorXml { job: "active-commit".into(), ready: true, path: Some("/images/base.raw".into()) };
    assert_eq!(vda.mirror, Some(mirror));
}

#[test]
fn each_disk_has_the_fate_that_it_deserves() {
    let skipped = |target: &str| match disk(MANY, target).fate {
        Fate::Skipped(why) => why,
        other => panic!("{target}: {other:?}"),
    };
    let refused = |target: &str| match disk(MANY, target).fate {
        Fate::Refused(why) => why,
        other => panic!("{target}: {other:?}"),
    };
    for target in ["vda", "vdb", "vdc"] {
        assert_eq!(disk(MANY, target).fate, Fate::Taken);
    }
    assert_eq!(skipped("sda"), "is a cdrom");
    assert_eq!(skipped("sdb"), "is a cdrom", "a network cdrom is no reason to refuse a backup");
    assert_eq!(skipped("fda"), "is a floppy");
    assert_eq!(skipped("sdc"), "is a LUN that is passed through");
    assert_eq!(skipped("vdd"), "is shareable");
    assert_eq!(skipped("vde"), "is transient");
    assert_eq!(skipped("vdf"), "is read-only");
    assert_eq!(refused("vdg"), "is a network disk");
    assert_eq!(refused("vdh"), "is encrypted by QEMU");
    assert!(refused("vdi").contains("storage pool"));
    assert!(refused("vdj").contains("vmdk"));
    assert_eq!(refused("vdk"), "stands on an image that is a network disk");
}

#[test]
fn setting_what_is_there_changes_no_byte() {
    let chain = [image("/dev/vg/data", ImageFormat::Raw)];
    assert_eq!(set_disk(MANY, "vdb", &chain, &dev_is_block).unwrap(), MANY);
}

#[test]
fn an_overlay_takes_the_place_of_a_file() {
    let chain = [
        image("/images/it's <new>.qcow2", ImageFormat::Qcow2),
        image("/images/web & shop/root.qcow2", ImageFormat::Qcow2),
        image("/images/middle.qcow2", ImageFormat::Qcow2),
        image("/dev/vg/template", ImageFormat::Raw),
    ];
    let new = set_disk(MANY, "vda", &chain, &dev_is_block).unwrap();
    let (gone, come) = changed(MANY, &new);
    assert_eq!(gone.len(), 10, "source and backing stores: {gone:?}");
    assert_eq!(
        come,
        [
            "<source startupPolicy='mandatory' file='/images/it&apos;s &lt;new&gt;.qcow2'><seclabel model='dac' relabel='no'/></source>",
            "<backingStore type='file'><format type='qcow2'/><source file='/images/web &amp; shop/root.qcow2'/>\
             <backingStore type='file'><format type='qcow2'/><source file='/images/middle.qcow2'/>\
             <backingStore type='block'><format type='raw'/><source dev='/dev/vg/template'/>\
             <backingStore/></backingStore></backingStore></backingStore>",
        ]
    );
    let vda = disk(&new, "vda");
    assert_eq!(vda.source, DiskSource::File("/images/it's <new>.qcow2".into()));
    assert_eq!((vda.backing.len(), vda.terminated), (3, true));
}

#[test]
fn an_overlay_over_a_block_device_is_a_file_and_back() {
    let overlay = [image("/images/o", ImageFormat::Qcow2), image("/dev/vg/data", ImageFormat::Raw)];
    let new = set_disk(MANY, "vdb", &overlay, &dev_is_block).unwrap();
    let (gone, come) = changed(MANY, &new);
    assert_eq!(gone.len(), 4);
    assert_eq!(
        come,
        [
            "<disk type='file' device='disk'>",
            "<driver name='qemu' type='qcow2' cache='none'/>",
            "<source file='/images/o'/>",
            ""
        ],
        "the backing store that said that there is none is gone"
    );
    let back = set_disk(&new, "vdb", &overlay[1..], &dev_is_block).unwrap();
    let vdb = disk(&back, "vdb");
    assert_eq!(vdb.source, DiskSource::Block("/dev/vg/data".into()));
    assert_eq!(vdb.driver_type.as_deref(), Some("raw"));
}

#[test]
fn a_driver_or_its_type_that_is_missing_is_added() {
    let chain = [image("/images/o", ImageFormat::Qcow2)];
    let new = set_disk(MANY, "vdc", &chain, &never_block).unwrap();
    let (gone, come) = changed(MANY, &new);
    assert_eq!(gone, ["<source file='/images/plain.img'/>"]);
    assert_eq!(come, ["<driver name='qemu' type='qcow2'/>", "<source file='/images/o'/>"]);

    let bare = MANY.replace(" type=\"qcow2\" name='qemu' cache='none' io='io_uring'/>", "/>");
    let new = set_disk(&bare, "vda", &chain, &never_block).unwrap();
    assert_eq!(disk(&new, "vda").driver_type.as_deref(), Some("qcow2"));
    assert!(new.contains("<driver type='qcow2'   discard='unmap'/>"), "{new}");
}

#[test]
fn several_disks_are_changed_one_after_the_other() {
    let mut text = MANY.to_owned();
    for target in ["vda", "vdb", "vdc"] {
        text = set_disk(&text, target, &[image(&format!("/o/{target}"), ImageFormat::Qcow2)], &never_block)
            .unwrap();
    }
    for target in ["vda", "vdb", "vdc"] {
        assert_eq!(disk(&text, target).source, DiskSource::File(format!("/o/{target}").into()));
    }
    // Nothing else is another disk now, and the text around is whole.
    let others = |text: &str| parse(text).unwrap().disks.split_off(3);
    assert_eq!(others(&text), others(MANY));
    assert!(
        text.starts_with("<!-- kept: a person's note before the root -->\n<domain type='kvm' xmlns:qemu=")
    );
    assert!(text.contains("<!-- the root disk: do not touch -->"));
    assert!(text.contains("<disk type='file'><target dev='vda'/><source file='/never/this.qcow2'/></disk>"));
    assert!(text.ends_with("</domain>\n<!-- kept: and one after it -->\n"));
}

#[test]
fn a_disk_that_is_not_there_is_not_changed() {
    let chain = [image("/o", ImageFormat::Qcow2)];
    assert_eq!(set_disk(MANY, "vdz", &chain, &never_block), Err("has no disk vdz".into()));
    assert!(set_disk(MANY, "vda", &[], &never_block).is_err());
    assert!(set_disk("<domain>", "vda", &chain, &never_block).is_err());
}

#[test]
fn what_is_no_definition_is_refused() {
    for text in ["", "x", "<pool/>", "<domain/>", "<domain><name>a</name><uuid>zz</uuid></domain>"] {
        assert!(parse(text).is_err(), "{text}");
    }
    let twice = "<domain><name>a</name><devices><disk><target dev='a'/></disk><disk><target dev='a'/></disk></devices></domain>";
    assert!(parse(twice).unwrap_err().contains("twice"));
    let entity = "<!DOCTYPE d [<!ENTITY x 'y'>]><domain><name>&x;</name></domain>";
    assert!(parse(entity).is_err(), "no document types");
}

#[test]
fn a_snapshot_names_every_disk() {
    let overlays = [NewOverlay { target: "vda".into(), path: "/o/a&b".into() }];
    assert_eq!(
        snapshot(&overlays, &["sda"]).unwrap(),
        "<domainsnapshot><disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>\
         <source file='/o/a&amp;b'/></disk><disk name='sda' snapshot='no'/></disks></domainsnapshot>"
    );
}

#[test]
fn disks_of_a_snapshot_and_of_the_definitions_in_it_are_found() {
    let body = LIVE.trim_end();
    let text = format!(
        "<domainsnapshot><name>s</name><disks><disk name='vda' snapshot='external' type='file'>\
         <driver type='qcow2'/><source file='/images/s.qcow2'/></disk></disks>{body}</domainsnapshot>"
    );
    let disks = parse_snapshot(&text).unwrap();
    let paths: Vec<_> = disks.iter().map(|d| (d.target.as_str(), d.source.path().unwrap())).collect();
    assert_eq!(paths, [("vda", Path::new("/images/d2.qcow2")), ("vda", Path::new("/images/s.qcow2"))]);
}
