//! Names of users and groups, from the files that hold them.

use std::fs;

/// A user's name; the number when there is none.
pub(crate) fn name(uid: u32) -> String {
    entry("/etc/passwd", uid)
}

/// A group's name; the number when there is none.
pub(crate) fn group(gid: u32) -> String {
    entry("/etc/group", gid)
}

fn entry(file: &str, id: u32) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| id.to_string())
}
