//! What the streams need of a file system: private files and directories that survive a crash, and which kind it is.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Makes a directory and those above it, 0700 whatever the umask. Returns the directories whose entries are new: they
/// are not durable before each went through [`sync_dir`].
pub(crate) fn make_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut changed = Vec::new();
    make_dir_in(path, &mut changed)?;
    Ok(changed)
}

fn make_dir_in(path: &Path, changed: &mut Vec<PathBuf>) -> io::Result<()> {
    let made = match make_one_dir(path) {
        Err(error) if is_missing(&error) => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).ok_or(error)?;
            make_dir_in(parent, changed)?;
            make_one_dir(path)
        }
        other => other,
    };
    match made {
        Ok(()) => changed.extend(path.parent().filter(|parent| !parent.as_os_str().is_empty()).map(Path::to_owned)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Makes one directory, or fails when it is there.
pub(crate) fn make_one_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)?;
    let meta = std::fs::metadata(path)?;
    if meta.mode() & 0o777 != 0o700 {
        std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Makes a file that must not be there yet, 0600 whatever the umask, opened for appending.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path)?;
    if file.metadata()?.mode() & 0o777 != 0o600 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Opens a file that must be there, for appending.
pub(crate) fn open_append(path: &Path) -> io::Result<File> {
    regular(OpenOptions::new().read(true).append(true).custom_flags(no_tricks()).open(path)?)
}

/// Opens a file for reading; `None` when it is not there.
pub(crate) fn open_read(path: &Path) -> io::Result<Option<File>> {
    match OpenOptions::new().read(true).custom_flags(no_tricks()).open(path) {
        Ok(file) => regular(file).map(Some),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Neither a link to elsewhere nor a pipe that would block us is ever a segment.
fn no_tricks() -> i32 {
    (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()
}

fn regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"))
}

/// The file or a directory on the way to it is not there.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// The file handle points to a file that another client has removed.
pub(crate) fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::STALE.raw_os_error())
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        // Some network file systems have no such call for directories; there the server keeps the promise.
        Err(error) if no_dir_sync(&error) => Ok(()),
        other => other,
    }
}

fn no_dir_sync(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::NOTSUP, Errno::NOSYS].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// File systems whose changes may come from another host: they tell nobody of them and cache attributes.
const NETWORK: &[(u32, &str)] = &[
    (0x0000_6969, "nfs"),
    (0x0BD0_0BD0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0x1983_0326, "beegfs"),
    (0x6573_5546, "fuse"),
    (0x00C3_6400, "ceph"),
    (0xFF53_4D42, "cifs"),
    (0xFE53_4D42, "smb2"),
    (0x0000_517B, "smb"),
    (0x5346_414F, "afs"),
    (0x6B41_4653, "afs"),
    (0x0102_1997, "9p"),
    (0x7375_7245, "coda"),
    (0x7461_636F, "ocfs2"),
    (0x0116_1970, "gfs2"),
    (0xAAD7_AAEA, "panfs"),
    (0x786F_4256, "vboxsf"),
    (0x2030_5346, "orangefs"),
];

/// The name of the network file system that holds `path`, or `None` when it is local. A path that does not exist yet is
/// judged by the nearest directory above it.
pub fn is_network_fs(path: &Path) -> io::Result<Option<&'static str>> {
    Ok(network_name(magic(path)?))
}

/// The number of the file system.
fn magic(path: &Path) -> io::Result<u32> {
    let mut at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    loop {
        match rustix::fs::statfs(at) {
            Ok(stat) => return Ok(stat.f_type as u32),
            Err(Errno::NOENT) => match at.parent() {
                Some(parent) if parent.as_os_str().is_empty() => at = Path::new("."),
                Some(parent) => at = parent,
                None => return Err(Errno::NOENT.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

/// File systems of this machine alone: whatever changes in them, the system tells of.
const LOCAL: &[u32] = &[
    0x0000_EF53, // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0x0102_1994, // tmpfs
    0xF2F5_2010, // f2fs
    0x2FC1_2FC1, // zfs
];

/// Whether `path`, or the nearest directory above it, is for sure on a file system that no other machine writes to. One that
/// is not known is neither this nor a network file system.
pub fn is_surely_local(path: &Path) -> io::Result<bool> {
    Ok(LOCAL.contains(&magic(path)?))
}

/// Whether an open file is on a network file system.
pub(crate) fn is_on_network(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| network_name(stat.f_type as u32).is_some())
}

fn network_name(magic: u32) -> Option<&'static str> {
    NETWORK.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_apart_by_their_number() {
        assert_eq!(network_name(0x6969), Some("nfs"));
        assert_eq!(network_name(0x0BD0_0BD0), Some("lustre"));
        assert_eq!(network_name(0xEF53), None, "ext4");
        assert_eq!(network_name(0x0102_1994), None, "tmpfs");
        assert_eq!(is_network_fs(Path::new("/proc/self/not/there/yet")).unwrap(), None);
        assert!(!is_surely_local(Path::new("/proc")).unwrap(), "nobody is told of changes there");
        assert!(NETWORK.iter().all(|(magic, _)| !LOCAL.contains(magic)));
        assert_eq!(is_network_fs(Path::new("not/there/yet")).unwrap(), is_network_fs(Path::new(".")).unwrap());
    }

    #[test]
    fn a_link_or_a_pipe_is_no_segment() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("link")).unwrap();
        open_read(&dir.path().join("link")).unwrap_err();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        open_read(&dir.path().join("pipe")).unwrap_err();
        assert!(open_read(&dir.path().join("missing")).unwrap().is_none());
    }
}
