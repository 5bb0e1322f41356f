//! A directory goes and comes back as it was; what must not be is refused.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::process::Command;

use super::*;

fn limits() -> Limits {
    Limits { bytes: 64 << 20, entries: 1000 }
}

/// Everything below a directory, with permissions, times and content.
fn picture(dir: &Path) -> BTreeMap<PathBuf, String> {
    fn below(dir: &Path, root: &Path, all: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_dir() {
                below(&path, root, all);
                format!("dir {:o}", meta.mode())
            } else if meta.is_symlink() {
                format!("link {}", std::fs::read_link(&path).unwrap().display())
            } else {
                let content = std::fs::read(&path).unwrap();
                format!("file {:o} {} {:?} {:?}", meta.mode(), meta.mtime(), meta.mtime_nsec(), content)
            };
            all.insert(path.strip_prefix(root).unwrap().to_owned(), what);
        }
    }
    let mut all = BTreeMap::new();
    below(dir, dir, &mut all);
    all
}

fn git(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"])
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        // Looking must change nothing.
        .env("GIT_OPTIONAL_LOCKS", "0")
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_repository_with_staged_untracked_and_ignored_files_comes_back_as_it_was() {
    let place = tempfile::tempdir().unwrap();
    let (dir, pieces, there) = (place.path().join("here"), place.path().join("pieces"), place.path().join("there/dir"));
    std::fs::create_dir(&dir).unwrap();
    git(&dir, &["init", "-q"]);
    std::fs::write(dir.join("tracked"), "one").unwrap();
    std::fs::write(dir.join(".gitignore"), "ignored\n").unwrap();
    git(&dir, &["add", "."]);
    git(&dir, &["commit", "-q", "-m", "first"]);
    std::fs::write(dir.join("staged"), "two").unwrap();
    git(&dir, &["add", "staged"]);
    std::fs::write(dir.join("tracked"), "changed").unwrap();
    std::fs::write(dir.join("ignored"), "three").unwrap();
    std::fs::create_dir_all(dir.join("deep/empty")).unwrap();
    std::fs::write(dir.join("deep/large"), vec![7; 3 << 20]).unwrap();
    std::fs::write(dir.join("run"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(dir.join("run"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(dir.join("deep/read-only"), "x").unwrap();
    std::fs::set_permissions(dir.join("deep"), std::fs::Permissions::from_mode(0o555)).unwrap();
    symlink("deep/large", dir.join("link")).unwrap();
    symlink("/nowhere/at/all", dir.join("dangling")).unwrap();

    let mut capturer = Capturer::new(&dir, &pieces, limits());
    let first = capturer.capture().unwrap();
    assert!(first.read > 5 && first.written > 5);
    restore(&pieces, &first.manifest, &there, limits()).unwrap();
    assert_eq!(picture(&there), picture(&dir));
    assert_eq!(
        git(&there, &["status", "--porcelain=v2", "--ignored"]),
        git(&dir, &["status", "--porcelain=v2", "--ignored"])
    );
    assert_eq!(git(&there, &["log", "--oneline"]), git(&dir, &["log", "--oneline"]));

    // Only what changed is read and written after that.
    let again = capturer.capture().unwrap();
    assert_eq!((again.read, again.written, &again.manifest), (0, 0, &first.manifest));
    std::fs::write(dir.join("tracked"), "once more").unwrap();
    let third = capturer.capture().unwrap();
    assert_eq!(third.read, 1);
    assert!(third.written <= 3, "the file, the manifest and its list: {}", third.written);
    // What is there is replaced as a whole.
    std::fs::write(there.join("of no use"), "x").unwrap();
    restore(&pieces, &third.manifest, &there, limits()).unwrap();
    assert_eq!(picture(&there), picture(&dir));
    assert_eq!(std::fs::read_dir(place.path().join("there")).unwrap().count(), 1, "nothing is left behind");
    std::fs::set_permissions(dir.join("deep"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(there.join("deep"), std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_too_large_is_refused_before_anything_is_copied_and_says_what_it_is() {
    let place = tempfile::tempdir().unwrap();
    let (dir, pieces) = (place.path().join("here"), place.path().join("pieces"));
    std::fs::create_dir_all(dir.join("node_modules/x")).unwrap();
    std::fs::write(dir.join("node_modules/x/big"), vec![0; 2000]).unwrap();
    std::fs::write(dir.join("small"), "x").unwrap();
    let refuse = |limits| Capturer::new(&dir, &pieces, limits).capture().unwrap_err();
    let error = refuse(Limits { bytes: 1000, entries: 100 });
    assert!(
        matches!(&error, BundleError::TooLarge { of: "bytes", largest, .. } if largest == "node_modules"),
        "{error}"
    );
    let error = refuse(Limits { bytes: 10_000, entries: 3 });
    assert!(
        matches!(&error, BundleError::TooLarge { of: "files", largest, .. } if largest == "node_modules"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(&pieces).unwrap().count(), 0);
}

#[test]
fn nothing_is_made_outside_and_damage_is_found() {
    let place = tempfile::tempdir().unwrap();
    let (dir, pieces, there) = (place.path().join("here"), place.path().join("pieces"), place.path().join("there"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("file"), "content").unwrap();
    let captured = Capturer::new(&dir, &pieces, limits()).capture().unwrap();
    restore(&pieces, &captured.manifest, &there, limits()).unwrap();
    let before = picture(&there);

    for path in ["../out", "/tmp/out", "a/../../out", "", "."] {
        let manifest = Manifest { v: 1, entries: vec![Entry { path: path.into(), kind: Kind::Dir { mode: 0o755 } }] };
        assert!(matches!(manifest.check(), Err(BundleError::Damaged(_))), "{path:?}");
    }
    // A file through a link that the same bundle makes.
    let file = |path: &str| {
        let kind = Kind::File { mode: 0o644, size: 0, changed_ns: 0, pieces: Vec::new() };
        Entry { path: path.into(), kind }
    };
    let link = Entry { path: "way".into(), kind: Kind::Link { target: place.path().display().to_string() } };
    let name = keep(&pieces, &Manifest { v: 1, entries: vec![link, file("way/out")] });
    assert!(restore(&pieces, &name, &there, limits()).is_err());
    assert!(!place.path().join("out").exists());

    let piece = crate::store::pieces::name_of(b"content");
    std::fs::write(pieces.join(&piece), "c0ntent").unwrap();
    let error = restore(&pieces, &captured.manifest, &there, limits()).unwrap_err();
    assert!(matches!(error, BundleError::Store(StoreError::Mismatch { .. })), "{error}");
    assert_eq!(picture(&there), before, "what was there is there");
    assert!(restore(&pieces, "../../etc/passwd", &there, limits()).is_err());
    let much = Limits { bytes: 3, entries: 10 };
    assert!(matches!(restore(&pieces, &captured.manifest, &there, much), Err(BundleError::Damaged(_))));
}

fn keep(pieces: &Path, manifest: &Manifest) -> String {
    let text = serde_json::to_vec(manifest).unwrap();
    let (name, _) = crate::store::pieces::keep_piece(pieces, &text).unwrap();
    crate::store::pieces::keep_piece(pieces, name.as_bytes()).unwrap().0
}
