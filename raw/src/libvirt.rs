//! libvirt's library, loaded by the first call of it. With all that it needs it is more than fifty libraries, which take longer to
//! load than `img check` takes, or a mount to start: so only what talks to libvirt loads them, and the rest runs without.
//!
//! The crate `virt` calls functions by their names. Those that knibfs reaches are defined here under the same names, so that
//! the linker has no need of the library; each finds the library's own and calls it. A function that is missing in the list
//! does no harm: the program is then linked with the library, as it would be without this module, and a test says so.
#![allow(unsafe_code)]
#![allow(non_snake_case)]

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use libloading::Library;
use virt::sys;

/// The names that the linker would have written down.
const CORE: &str = "libvirt.so.0";
const QEMU: &str = "libvirt-qemu.so.0";

struct Libraries {
    core: Library,
    qemu: Library,
}

fn libraries() -> Result<&'static Libraries, &'static str> {
    static LIBRARIES: OnceLock<Result<Libraries, String>> = OnceLock::new();
    let open = |name: &str| {
        // SAFETY: libvirt's libraries may be loaded from any thread at any time; what they do while they are loaded is what
        // they would do at the start of a program that is linked with them.
        unsafe { Library::new(name) }.map_err(|e| e.to_string())
    };
    let found = LIBRARIES.get_or_init(|| Ok(Libraries { core: open(CORE)?, qemu: open(QEMU)? }));
    found.as_ref().map_err(String::as_str)
}

/// Loads the library, which is kept until the program ends. The error is the loader's: which file is missing.
/// Without it every call of libvirt fails, and cannot say why.
pub fn load() -> Result<(), &'static str> {
    libraries().map(|_| ())
}

macro_rules! forward {
    ($library:ident: $($name:ident($($arg:ident: $type:ty),*) -> $result:ty = $failed:expr;)*) => { $(
        // The compiler compares the types with those of the bindings.
        const _: unsafe extern "C" fn($($type),*) -> $result = sys::$name;

        // SAFETY: the name is libvirt's, and no other library's that is linked here: what calls it means this function.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            type Function = unsafe extern "C" fn($($type),*) -> $result;
            static FOUND: OnceLock<Option<Function>> = OnceLock::new();
            let found = FOUND.get_or_init(|| {
                // SAFETY: the type is that of the bindings to the library, see above. The library is never unloaded.
                libraries().ok().and_then(|l| unsafe { l.$library.get::<Function>(stringify!($name)) }.ok().map(|f| *f))
            });
            match found {
                // SAFETY: the arguments are the caller's, who keeps to what libvirt asks for.
                Some(function) => unsafe { function($($arg),*) },
                None => $failed,
            }
        }
    )* }
}

forward! { core:
    virConnectClose(conn: sys::virConnectPtr) -> c_int = -1;
    virConnectIsAlive(conn: sys::virConnectPtr) -> c_int = -1;
    virConnectListAllDomains(conn: sys::virConnectPtr, domains: *mut *mut sys::virDomainPtr, flags: c_uint) -> c_int = -1;
    virConnectOpen(name: *const c_char) -> sys::virConnectPtr = null_mut();
    virConnectRef(conn: sys::virConnectPtr) -> c_int = -1;
    virDomainAttachDeviceFlags(domain: sys::virDomainPtr, xml: *const c_char, flags: c_uint) -> c_int = -1;
    virDomainCreate(domain: sys::virDomainPtr) -> c_int = -1;
    virDomainDefineXML(conn: sys::virConnectPtr, xml: *const c_char) -> sys::virDomainPtr = null_mut();
    virDomainFree(domain: sys::virDomainPtr) -> c_int = -1;
    virDomainGetName(domain: sys::virDomainPtr) -> *const c_char = null();
    virDomainGetState(domain: sys::virDomainPtr, state: *mut c_int, reason: *mut c_int, flags: c_uint) -> c_int = -1;
    virDomainGetUUID(domain: sys::virDomainPtr, uuid: *mut c_uchar) -> c_int = -1;
    virDomainGetXMLDesc(domain: sys::virDomainPtr, flags: c_uint) -> *mut c_char = null_mut();
    virDomainHasManagedSaveImage(dom: sys::virDomainPtr, flags: c_uint) -> c_int = -1;
    virDomainIsActive(dom: sys::virDomainPtr) -> c_int = -1;
    virDomainIsPersistent(dom: sys::virDomainPtr) -> c_int = -1;
    virDomainListAllSnapshots(domain: sys::virDomainPtr, snaps: *mut *mut sys::virDomainSnapshotPtr, flags: c_uint) -> c_int = -1;
    virDomainLookupByName(conn: sys::virConnectPtr, name: *const c_char) -> sys::virDomainPtr = null_mut();
    virDomainLookupByUUID(conn: sys::virConnectPtr, uuid: *const c_uchar) -> sys::virDomainPtr = null_mut();
    virDomainManagedSave(dom: sys::virDomainPtr, flags: c_uint) -> c_int = -1;
    virDomainRef(domain: sys::virDomainPtr) -> c_int = -1;
    virDomainResume(domain: sys::virDomainPtr) -> c_int = -1;
    virDomainSnapshotCreateXML(domain: sys::virDomainPtr, xml_desc: *const c_char, flags: c_uint) -> sys::virDomainSnapshotPtr = null_mut();
    virDomainSnapshotFree(snapshot: sys::virDomainSnapshotPtr) -> c_int = -1;
    virDomainSnapshotGetName(snapshot: sys::virDomainSnapshotPtr) -> *const c_char = null();
    virDomainSnapshotGetXMLDesc(snapshot: sys::virDomainSnapshotPtr, flags: c_uint) -> *mut c_char = null_mut();
    virDomainSuspend(domain: sys::virDomainPtr) -> c_int = -1;
    virDomainUndefineFlags(domain: sys::virDomainPtr, flags: c_uint) -> c_int = -1;
    virGetLastError() -> sys::virErrorPtr = null_mut();
    virSetErrorFunc(user_data: *mut c_void, handler: sys::virErrorFunc) -> () = ();
    virStoragePoolFree(pool: sys::virStoragePoolPtr) -> c_int = -1;
    virStoragePoolLookupByName(conn: sys::virConnectPtr, name: *const c_char) -> sys::virStoragePoolPtr = null_mut();
    virStorageVolFree(vol: sys::virStorageVolPtr) -> c_int = -1;
    virStorageVolGetPath(vol: sys::virStorageVolPtr) -> *mut c_char = null_mut();
    virStorageVolLookupByName(pool: sys::virStoragePoolPtr, name: *const c_char) -> sys::virStorageVolPtr = null_mut();
}

forward! { qemu:
    virDomainQemuAgentCommand(domain: sys::virDomainPtr, cmd: *const c_char, timeout: c_int, flags: c_uint) -> *mut c_char = null_mut();
    virDomainQemuMonitorCommand(domain: sys::virDomainPtr, cmd: *const c_char, result: *mut *mut c_char, flags: c_uint) -> c_int = -1;
}
