//! Gives back memory that only the start of a daemon needed.
//!
//! The code that reads arguments and configuration, and its constants, stay mapped for as long as the process lives, and count as its memory,
//! though it never runs again: half and more of what a small daemon takes. The kernel reads pages of code from the program's
//! file again whenever they are needed, so they can be let go at any time; what still runs comes back within microseconds. The
//! heap that the start needed is given back too, and the allocator of the system is told how a daemon lives.

use std::ffi::c_void;
use std::fs;
use std::io;

use rustix::mm::{Advice, madvise};

/// Lets go of all pages of code and constants that this process has mapped from files. Those in use come back by themselves.
pub fn release_code() -> io::Result<()> {
    for (start, length) in untouched(&fs::read_to_string("/proc/self/smaps")?) {
        release(start, length)?;
    }
    Ok(())
}

/// The mappings that are what their file says: private, never writable, and without a page of our own. Tables that the loader has
/// filled in are read-only too, but some of their pages are ours.
fn untouched(smaps: &str) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    // Whether the mapping that is being read is the last one found.
    let mut open = false;
    for line in smaps.lines() {
        match line.split_once(':') {
            // `Anonymous:             8 kB`
            Some((key, value)) if key.chars().all(|letter| letter.is_ascii_alphabetic() || letter == '_') => {
                let own = matches!(key, "Anonymous" | "Swap") && !value.trim_start().starts_with("0 ");
                if own && open {
                    found.pop();
                    open = false;
                }
            }
            _ => {
                let mapping = mapping(line);
                open = mapping.is_some();
                found.extend(mapping);
            }
        }
    }
    found
}

/// A mapping of a file that nobody may write to.
fn mapping(line: &str) -> Option<(usize, usize)> {
    // `55d0c0a00000-55d0c1400000 r-xp 00200000 fe:00 1234      /usr/bin/program`
    let mut parts = line.split_ascii_whitespace();
    let (range, rights, file) = (parts.next()?, parts.next()?, parts.nth(3)?);
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let read_only = matches!(rights, "r-xp" | "r--p");
    (read_only && file.starts_with('/') && start < end).then(|| (start, end - start))
}

#[expect(unsafe_code, reason = "letting go of pages is a call on raw addresses")]
fn release(start: usize, length: usize) -> io::Result<()> {
    let address = std::ptr::without_provenance_mut::<c_void>(start);
    // SAFETY: The range is a private mapping of a file that this process cannot write to and of which it has no page of its own, so
    // none differs from the file: the next access, also by this very code, reads the same bytes again. No Rust object lives in it that anybody
    // could have changed.
    unsafe { madvise(address, length, Advice::LinuxDontNeed) }?;
    Ok(())
}

/// Bytes of memory of this process's own, which no file stands for: heaps and stacks.
pub fn own_bytes() -> io::Result<u64> {
    // Pages: all, resident, of these shared.
    let counts = fs::read_to_string("/proc/self/statm")?;
    let mut counts = counts.split_ascii_whitespace().skip(1).map_while(|count| count.parse::<u64>().ok());
    let (resident, shared) = (counts.next().unwrap_or_default(), counts.next().unwrap_or_default());
    Ok(resident.saturating_sub(shared) * rustix::param::page_size() as u64)
}

/// Pieces of this size and more are given back the moment they are free. The allocator raises the bound by itself to the size of what it
/// sees, and then buffers that come and go lie between small things that stay.
const LARGE: i32 = 64 << 10;

/// Keeps the allocator at so many heaps, and buffers out of them. For the very beginning of a program, before it has threads; a person who has
/// set `MALLOC_ARENA_MAX` or `MALLOC_MMAP_THRESHOLD_` is obeyed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the allocator is told in its own language")]
pub fn few_heaps(heaps: i32) {
    const M_MMAP_THRESHOLD: i32 = -3;
    const M_ARENA_MAX: i32 = -8;
    unsafe extern "C" {
        fn mallopt(param: i32, value: i32) -> i32;
    }
    let settings = [("MALLOC_ARENA_MAX", M_ARENA_MAX, heaps), ("MALLOC_MMAP_THRESHOLD_", M_MMAP_THRESHOLD, LARGE)];
    for (variable, param, value) in settings {
        if std::env::var_os(variable).is_none() {
            // SAFETY: The function of glibc takes two numbers, knows these parameters, and says no to a value that it cannot use.
            unsafe { mallopt(param, value) };
        }
    }
}

/// Other allocators have no such settings.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn few_heaps(_heaps: i32) {}

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
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// Whoever counts this process's memory counts what the other tests allocate.
    static COUNTING: Mutex<()> = Mutex::new(());

    #[test]
    fn only_what_is_as_in_its_file_is_let_go() {
        let smaps = "\
55d0c0a00000-55d0c0a10000 r--p 00000000 fe:00 1234      /usr/bin/program
Rss:                  64 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd mr mw me sd
55d0c0a10000-55d0c0a12000 r-xp 00010000 fe:00 1234      /usr/bin/program (deleted)
Anonymous:             0 kB
55d0c0a12000-55d0c0a13000 r--p 00012000 fe:00 1234      /usr/bin/filled by: the loader
Anonymous:             4 kB
Swap:                  0 kB
55d0c0a13000-55d0c0a14000 r--p 00013000 fe:00 1234      /usr/bin/program
Anonymous:             0 kB
Swap:                  4 kB
55d0c0a14000-55d0c0a15000 rw-p 00014000 fe:00 1234      /usr/bin/program
Anonymous:             0 kB
7f0000000000-7f0000001000 rwxp 00000000 00:00 0
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0          [vdso]
Anonymous:             0 kB
garbage";
        assert_eq!(untouched(smaps), [(0x55d0_c0a0_0000, 0x10000), (0x55d0_c0a1_0000, 0x2000)]);
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

    /// What is large and free is not ours any more, whatever size came and went before.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn large_pieces_go_back_at_once() {
        const PIECES: usize = 256;
        const SIZE: usize = 96 << 10;
        let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
        few_heaps(2);
        // By this the allocator would learn that pieces of a MiB belong into its heaps.
        drop(vec![1_u8; 1 << 20]);
        // The small ones stay, and each would hold the end of a heap.
        let mut pieces: Vec<(Vec<u8>, Vec<u8>)> = (0..PIECES).map(|_| (vec![1; SIZE], vec![1; 64])).collect();
        let before = own_bytes().unwrap();
        for (large, _) in &mut pieces {
            *large = Vec::new();
        }
        let after = own_bytes().unwrap();
        assert!(before.saturating_sub(after) > (PIECES * SIZE / 2) as u64, "{before} bytes, then {after}");
        assert_eq!(pieces.len(), PIECES);
    }

    /// Only glibc keeps free pages in the midst of its heaps.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn free_pages_between_used_ones_are_given_back() {
        const PIECES: usize = 4096;
        let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
        // Below the size from which each piece would be a mapping of its own. Every tenth stays, so that no heap ends in something free.
        let mut pieces: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; 16 << 10]).collect();
        let mut number = 0;
        pieces.retain(|_| {
            number += 1;
            number % 10 == 0
        });
        let before = own_bytes().unwrap();
        release_heap();
        let (after, freed) = (own_bytes().unwrap(), (PIECES * 9 / 10) << 14);
        assert!(before.saturating_sub(after) > freed as u64 / 2, "{before} bytes, then {after}");
        assert_eq!(pieces.len(), PIECES / 10);
    }
}
