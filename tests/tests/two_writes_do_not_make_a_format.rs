//! The first sector of a disk whose format was guessed to be raw never begins to look like another format, not by
//! two writes at once either, each of which is harmless.

use std::sync::Barrier;

use img_core::format::OpenMode;

#[test]
fn two_writes_do_not_make_a_format() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).expect("written");
    let image = img_tests::open(&path, None, OpenMode::Write).expect("it opens");
    assert_eq!(image.warnings().len(), 1, "its format was guessed");
    assert!(image.write_at(b"QFI\xfb", 0).is_err(), "refused as a whole");
    let barrier = Barrier::new(2);
    for round in 0..300 {
        image.write_at(&[0; 512], 0).expect("written");
        let write = |bytes: &[u8], at: u64| {
            barrier.wait();
            image.write_at(bytes, at).is_ok()
        };
        let done = std::thread::scope(|scope| {
            let other = scope.spawn(|| write(b"I\xfb", 2));
            (write(b"QF", 0), other.join().expect("it ends"))
        });
        let mut head = [0; 4];
        image.read_at(&mut head, 0).expect("readable");
        assert_ne!(&head, b"QFI\xfb", "round {round}: {done:?}");
    }
}
