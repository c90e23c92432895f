//! Slices that somebody else has read, and offers.

use super::{MissingTable, table_cache::SliceCache};
use crate::storage::{MemoryStorage, Storage};

const SLICE: u64 = 512;
/// Slices so far apart share a shard.
const APART: u64 = 16 * SLICE;

/// A cache of two slices a shard, of a file whose slices hold their numbers.
fn cache_and_file() -> (SliceCache, MemoryStorage) {
    let bytes: Vec<u8> = (0..128_u8).flat_map(|number| [number; 512]).collect();
    (SliceCache::new(SLICE, 32 * SLICE), MemoryStorage::from_bytes("tables", &bytes))
}

/// As whoever is told of a missing slice reads it.
fn read(file: &MemoryStorage, missing: &MissingTable) -> Box<[u8]> {
    let mut bytes = vec![0; usize::try_from(missing.len_bytes).expect("small")].into_boxed_slice();
    file.read_at(&mut bytes, missing.at.0).expect("read");
    bytes
}

fn missing(cache: &SliceCache, at: u64) -> MissingTable {
    cache.missing(0, at..at + 8, cache.age()).expect("it is not here")
}

fn change(cache: &SliceCache, file: &MemoryStorage, at: u64, byte: u8) {
    cache.update(file, at, |bytes, within| bytes[within] = byte).expect("changed");
}

fn drop_all_of_shard(cache: &SliceCache, file: &MemoryStorage, at: u64) {
    for other in 1..5 {
        cache.get(file, at + other * APART).expect("read");
    }
    assert!(cache.peek(at & !(SLICE - 1)).is_none(), "it has made room");
}

fn first_byte(cache: &SliceCache, file: &MemoryStorage, at: u64) -> u8 {
    cache.get(file, at).expect("read").0[0]
}

#[test]
fn the_first_slice_that_is_not_here_is_missing_and_kept_when_it_is_offered() {
    let (cache, file) = cache_and_file();
    cache.get(&file, SLICE).expect("read");
    let age = cache.age();
    let first = cache.missing(7, SLICE + 8..4 * SLICE, age).expect("two are missing");
    assert_eq!((first.at.0, u64::from(first.len_bytes), first.level), (2 * SLICE, SLICE, 7));
    assert!(cache.offer(&first, read(&file, &first)));
    // It is not read again.
    file.write_at(&[99], 2 * SLICE).expect("written");
    assert_eq!(first_byte(&cache, &file, 2 * SLICE), 2);
    assert_eq!(cache.missing(7, SLICE + 8..4 * SLICE, age).map(|missing| missing.at.0), Some(3 * SLICE));
    assert_eq!(cache.missing(7, SLICE..3 * SLICE, age), None);
    assert!(!cache.offer(&missing(&cache, 5 * SLICE), Box::from([0; 100])), "it is not a slice");
}

/// Changed, written and dropped since it was read: what was read is old.
#[test]
fn what_was_written_meanwhile_is_not_replaced_by_what_was_there_before() {
    let (cache, file) = cache_and_file();
    let lacking = missing(&cache, 0);
    let old = read(&file, &lacking);
    change(&cache, &file, 0, 99);
    assert!(!cache.offer(&lacking, old.clone()), "it is here, and newer");
    assert_eq!(first_byte(&cache, &file, 0), 99);
    assert!(cache.write_back(&file, |_| true, |_| Ok(())).expect("written"));
    drop_all_of_shard(&cache, &file, 0);
    assert!(!cache.offer(&lacking, old));
    assert_eq!(first_byte(&cache, &file, 0), 99);
}

/// Forgotten, and given to something that is not written through the cache.
#[test]
fn what_was_forgotten_meanwhile_does_not_come_back() {
    let (cache, file) = cache_and_file();
    for forget in [|cache: &SliceCache| cache.forget(0..SLICE), SliceCache::clear] {
        let lacking = missing(&cache, 0);
        let old = read(&file, &lacking);
        forget(&cache);
        assert!(!cache.offer(&lacking, old));
        assert!(cache.peek(0).is_none());
    }
}
