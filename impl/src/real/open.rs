//! Opening host files and devices: refusals in QEMU's words, what kind of medium it is, O_DIRECT alignment.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs, ioctl_blksszget};
use rustix::io::{ReadWriteFlags, pread, preadv2, retry_on_intr};

use crate::env::{OpenStorage, StorageKind};
use crate::error::{Errno, QmpError};

/// Alignment of memory for O_DIRECT, bytes; enough for every Linux device.
pub(super) const MEMORY_ALIGN: usize = 4096;

/// `f_type` of file systems whose files are nothing but page cache.
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;

/// What is known of an opened object; constant while open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Medium {
    pub kind: StorageKind,
    /// Lives in memory: no call on it waits for a device.
    pub memory: bool,
    /// Opened with O_DIRECT.
    pub direct: bool,
    /// `preadv2(RWF_NOWAIT)` works.
    pub nowait: bool,
    /// Of offsets and lengths, bytes.
    pub alignment: u64,
}

pub(super) fn errno(e: rustix::io::Errno) -> Errno {
    Errno(e.raw_os_error())
}

pub(super) fn resolve(root: Option<&Path>, filename: &str) -> PathBuf {
    // QEMU strips the protocol prefix of its own host drivers.
    let plain = filename.strip_prefix("file:").unwrap_or(filename);
    root.map_or_else(|| PathBuf::from(plain), |root| root.join(plain))
}

pub(super) fn flags(writable: bool, direct: bool) -> OFlags {
    let mut flags = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    flags.set(OFlags::DIRECT, direct);
    flags | OFlags::CLOEXEC
}

/// Opens, checks the kind of file, and learns what the medium can do.
pub(super) fn open(root: Option<&Path>, args: &OpenStorage<'_>) -> Result<(Arc<File>, Medium), QmpError> {
    let name = args.filename;
    let could_not = |e: Errno| QmpError::errno(&format!("Could not open '{name}'"), e);
    let opened = rustix::fs::open(
        resolve(root, name),
        flags(args.writable, args.direct),
        Mode::empty(),
    );
    let fd = opened.map_err(|e| match e {
        rustix::io::Errno::INVAL if args.direct => QmpError::generic(format!(
            "Could not open '{name}': filesystem does not support O_DIRECT"
        )),
        e => could_not(errno(e)),
    })?;
    let stat = fstat(&fd).map_err(|e| QmpError::errno("Could not stat file", errno(e)))?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    match args.kind {
        // Read-only opening of a directory succeeds; QEMU finds out as late as here, with other words.
        StorageKind::File if file_type != FileType::RegularFile => {
            return Err(QmpError::generic(format!(
                "'file' driver requires '{name}' to be a regular file"
            )));
        }
        StorageKind::HostDevice
            if !matches!(file_type, FileType::BlockDevice | FileType::CharacterDevice) =>
        {
            return Err(QmpError::generic(format!(
                "'host_device' driver requires '{name}' to be either a character or block device"
            )));
        }
        StorageKind::HostDevice if args.writable && device_read_only(stat.st_rdev) => {
            return Err(QmpError::errno("The device is not writable", Errno::EACCES));
        }
        StorageKind::File | StorageKind::HostDevice => {}
    }
    let memory = args.kind == StorageKind::File && in_memory(fd.as_fd());
    let alignment = if args.direct {
        direct_alignment(fd.as_fd(), args.kind)?
    } else {
        1
    };
    let nowait = !args.direct && nowait_works(fd.as_fd());
    let medium = Medium {
        kind: args.kind,
        memory,
        direct: args.direct,
        nowait,
        alignment,
    };
    Ok((Arc::new(File::from(fd)), medium))
}

/// Opens the same object again with another mode. Through /proc, so that a file renamed meanwhile stays the same one.
pub(super) fn reopen(file: &File, writable: bool, medium: &Medium) -> Result<Arc<File>, Errno> {
    use std::os::fd::AsRawFd;
    if writable && medium.kind == StorageKind::HostDevice {
        let stat = fstat(file).map_err(errno)?;
        if device_read_only(stat.st_rdev) {
            return Err(Errno::EACCES);
        }
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let fd = rustix::fs::open(path, flags(writable, medium.direct), Mode::empty()).map_err(errno)?;
    Ok(Arc::new(File::from(fd)))
}

/// BLKROGET as sysfs tells it: a read-only device opens for writing, and then fails each write.
fn device_read_only(rdev: u64) -> bool {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    std::fs::read(format!("/sys/dev/block/{major}:{minor}/ro")).is_ok_and(|ro| ro.starts_with(b"1"))
}

fn in_memory(fd: BorrowedFd<'_>) -> bool {
    // f_type is signed on some architectures; only its bits count.
    fstatfs(fd).is_ok_and(|fs| matches!(fs.f_type.cast_unsigned() & 0xffff_ffff, TMPFS | RAMFS))
}

fn nowait_works(fd: BorrowedFd<'_>) -> bool {
    let mut byte = [0];
    match preadv2(fd, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT) {
        Ok(_) => true,
        Err(e) => e == rustix::io::Errno::AGAIN,
    }
}

/// The smallest unit in which O_DIRECT works here, found as QEMU does: the device's logical sector, else by trying.
fn direct_alignment(fd: BorrowedFd<'_>, kind: StorageKind) -> Result<u64, QmpError> {
    if kind == StorageKind::HostDevice
        && let Ok(sector) = ioctl_blksszget(fd)
    {
        return Ok(u64::from(sector));
    }
    let mut memory = vec![0; 2 * MEMORY_ALIGN];
    let start = memory.as_ptr().align_offset(MEMORY_ALIGN);
    for size in [1, 512, 1024, 2048, 4096] {
        let buffer = &mut memory[start..start + size];
        if retry_on_intr(|| pread(fd, &mut *buffer, 0)) != Err(rustix::io::Errno::INVAL) {
            // Success with one byte: the file system does not care, or emulates; whole pages are safe anywhere.
            return Ok(if size == 1 { 4096 } else { size as u64 });
        }
    }
    Err(QmpError::generic("Could not find working O_DIRECT alignment"))
}
