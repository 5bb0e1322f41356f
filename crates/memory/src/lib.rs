//! Gives back memory that only the start of a daemon needed.
//!
//! The code that reads arguments and configuration stays mapped for as long as the process lives, and counts as its memory,
//! though it never runs again: half and more of what a small daemon takes. The kernel reads pages of code from the program's
//! file again whenever they are needed, so they can be let go at any time; what still runs comes back within microseconds. The
//! heap that the start needed is given back too.

use std::ffi::c_void;
use std::fs;
use std::io;

use rustix::mm::{Advice, madvise};

/// Lets go of all pages of code that this process has mapped from files. Those in use come back by themselves.
pub fn release_code() -> io::Result<()> {
    for (start, length) in code(&fs::read_to_string("/proc/self/maps")?) {
        release(start, length)?;
    }
    Ok(())
}

/// The mappings that hold nothing but code from a file: readable, executable, private and never writable.
fn code(maps: &str) -> Vec<(usize, usize)> {
    let of_line = |line: &str| {
        // `55d0c0a00000-55d0c1400000 r-xp 00200000 fe:00 1234      /usr/bin/program`
        let mut parts = line.split_ascii_whitespace();
        let (range, rights, file) = (parts.next()?, parts.next()?, parts.nth(3)?);
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        (rights == "r-xp" && file.starts_with('/') && start < end).then(|| (start, end - start))
    };
    maps.lines().filter_map(of_line).collect()
}

#[expect(unsafe_code, reason = "letting go of pages is a call on raw addresses")]
fn release(start: usize, length: usize) -> io::Result<()> {
    let address = std::ptr::without_provenance_mut::<c_void>(start);
    // SAFETY: The range is a private mapping of a file that this process cannot write to, so no page of it differs from the
    // file: the next access, also by this very code, reads the same bytes again. No Rust object lives in it that anybody
    // could have changed.
    unsafe { madvise(address, length, Advice::LinuxDontNeed) }?;
    Ok(())
}

/// Gives back what the allocator holds for nothing: after many connections at once most of the heap is free and still ours.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the allocator is asked in its own language")]
pub fn release_heap() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> i32;
    }
    // SAFETY: The function of glibc takes a number, may be called at any time from any thread, and only gives back memory that nobody
    // has allocated.
    unsafe { malloc_trim(0) };
}

/// Other allocators give back by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn release_heap() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_from_files_is_let_go() {
        let maps = "\
55d0c0a00000-55d0c0a10000 r--p 00000000 fe:00 1234      /usr/bin/program
55d0c0a10000-55d0c0a12000 r-xp 00010000 fe:00 1234      /usr/bin/program (deleted)
55d0c0a12000-55d0c0a13000 rw-p 00012000 fe:00 1234      /usr/bin/program
7f0000000000-7f0000001000 rwxp 00000000 00:00 0
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0          [vdso]
garbage";
        assert_eq!(code(maps), [(0x55d0_c0a1_0000, 0x2000)]);
    }

    #[test]
    fn the_process_goes_on_as_before() {
        let resident = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let before = resident();
        release_code().unwrap();
        let after = resident();
        assert!(after <= before, "{before} kB, then {after} kB");
        release_heap();
        assert_eq!(format!("{:?}", (1..=3).collect::<Vec<u32>>()), "[1, 2, 3]");
    }
}
