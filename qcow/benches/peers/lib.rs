//! The engine and its peers behind one call: read bytes of the guest's disk. Each reads synchronously, in the thread that
//! asks, out of the page cache, with no locks and with the caches of tables that it has by itself.

use std::path::Path;

use imago::FormatDriverBuilder as _;
use knib_qcow::{Chain, Format, PlainPaths};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;

/// Why something could not be read.
pub type Failure = Box<dyn std::error::Error>;

/// A library with an image open.
pub trait Reader {
    /// The crate's name.
    fn name(&self) -> &'static str;

    /// Reads at each of `offsets` (bytes, multiples of 512) into `buf` and shows it to `each`.
    fn read(&mut self, buf: &mut [u8], offsets: &[u64], each: &mut dyn FnMut(&[u8])) -> Result<(), Failure>;
}

/// Opens the image at `path` with a library.
pub type Open = fn(&Path) -> Result<Box<dyn Reader>, Failure>;

/// The libraries: ours first.
pub const LIBRARIES: [(&str, Open); 3] = [("knib-qcow", knib), ("imago", imago), ("qcow2-rs", qcow2_rs)];

struct Knib(Chain);

fn knib(path: &Path) -> Result<Box<dyn Reader>, Failure> {
    Ok(Box::new(Knib(Chain::open(path, Format::Qcow2, &PlainPaths)?)))
}

impl Reader for Knib {
    fn name(&self) -> &'static str {
        "knib-qcow"
    }
    fn read(&mut self, buf: &mut [u8], offsets: &[u64], each: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        for offset in offsets {
            self.0.read_at(buf, *offset)?;
            each(buf);
        }
        Ok(())
    }
}

struct Imago(imago::FormatAccess<imago::file::File>);

fn imago(path: &Path) -> Result<Box<dyn Reader>, Failure> {
    let image = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path)
        .open(imago::PermissiveImplicitOpenGate::default())?;
    Ok(Box::new(Imago(imago::FormatAccess::new(image))))
}

impl Reader for Imago {
    fn name(&self) -> &'static str {
        "imago"
    }
    fn read(&mut self, buf: &mut [u8], offsets: &[u64], each: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        for offset in offsets {
            self.0.read(&mut *buf, *offset)?;
            each(buf);
        }
        Ok(())
    }
}

struct Qcow2Rs(Qcow2Dev<Qcow2IoSync>);

fn qcow2_rs(path: &Path) -> Result<Box<dyn Reader>, Failure> {
    // Blocks of 512 bytes, its default caches, read only, through the page cache.
    let parameters = Qcow2DevParams::new(9, None, None, true, false);
    let device = qcow2_setup_dev_sync(path, &parameters).map_err(|e| format!("{e:?}"))?;
    futures::executor::block_on(device.qcow2_prep_io()).map_err(|e| format!("{e:?}"))?;
    Ok(Box::new(Qcow2Rs(device)))
}

impl Reader for Qcow2Rs {
    fn name(&self) -> &'static str {
        "qcow2-rs"
    }
    fn read(&mut self, buf: &mut [u8], offsets: &[u64], each: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        // One executor for all of them: its start is nobody's work.
        futures::executor::block_on(async {
            for offset in offsets {
                let n = self.0.read_at(buf, *offset).await.map_err(|e| format!("{e:?}"))?;
                if n != buf.len() {
                    return Err(format!("{n} bytes of {} at {offset}", buf.len()).into());
                }
                each(&*buf);
            }
            Ok(())
        })
    }
}
