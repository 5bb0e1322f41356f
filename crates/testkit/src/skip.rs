//! What a test does that cannot run here: it says so where `cargo xtask test` looks for it.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

/// Notes that a test cannot run on this machine, and why; the test then returns. With `CI=true` nothing may be skipped, so
/// the test fails instead.
///
/// One line per test goes to `skipped-tests.txt` in cargo's target directory; the summary at the end names them.
pub fn skip(name: &str, why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{name} cannot run, and with CI=true nothing may be skipped: {why}"
    );
    let me = std::env::current_exe().unwrap_or_default();
    let Some(target) = me.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file()) else { return };
    let line = format!("{name}\t{}\n", why.replace('\n', " "));
    // Without the note the test still counts as run, as it would under plain cargo.
    let _ = note(&target.join("skipped-tests.txt"), &line);
}

/// The test that runs, by the name of its thread.
pub fn this_test() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

fn note(path: &Path, line: &str) -> std::io::Result<()> {
    OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
}
