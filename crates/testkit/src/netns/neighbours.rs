//! Room in the kernel's table of hardware addresses. All namespaces of a machine share one table, of 1,024 entries as a rule: thirty hosts
//! that talk to each other need 870, and when it is full nobody on the machine finds anybody, the machine itself included.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

/// Beyond the first number entries may be forgotten, beyond the second they are, beyond the third there are none.
const LIMITS: [(&str, u32); 3] = [("gc_thresh1", 16_384), ("gc_thresh2", 32_768), ("gc_thresh3", 65_536)];

/// How many laboratories are open, and what the limits were before the first.
static OPEN: Mutex<(usize, BTreeMap<PathBuf, String>)> = Mutex::new((0, BTreeMap::new()));

/// The limits are what they were when the last of these is gone.
pub(super) struct Room;

impl Room {
    pub(super) fn make() -> Self {
        if let Ok(mut open) = OPEN.lock() {
            open.0 += 1;
            if open.0 == 1 {
                // The largest first, as the kernel has it; where none can be raised, small laboratories work all the same.
                for (name, wanted) in LIMITS.iter().rev() {
                    let path = PathBuf::from(format!("/proc/sys/net/ipv4/neigh/default/{name}"));
                    let Ok(before) = fs::read_to_string(&path) else { continue };
                    let less = before.trim().parse::<u32>().is_ok_and(|before| before < *wanted);
                    if less && fs::write(&path, wanted.to_string()).is_ok() {
                        open.1.insert(path, before);
                    }
                }
            }
        }
        Self
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Ok(mut open) = OPEN.lock() {
            open.0 -= 1;
            if open.0 == 0 {
                for (path, before) in std::mem::take(&mut open.1) {
                    let _ = fs::write(path, before);
                }
            }
        }
    }
}
