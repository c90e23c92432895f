//! Raw data has no metadata that a second user could spoil: as in the reference, an image that somebody
//! writes may be looked at, but it is no source of a conversion and is not resized.

use std::process::Command;

use img_core::{
    format::OpenMode,
    image::{Image, ImageName, OpenOptions},
    storage::{FileOptions, Preallocation, Storage, lock::Use},
};

#[test]
fn raw_images_in_use_may_be_read_but_not_converted() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    let path = path.to_str().expect("UTF-8");
    let writer = FileOptions::new().create_new(true).open(path).expect("a new file");
    writer.resize(1 << 20, Preallocation::Off).expect("room");
    writer.lock(Use::Create).expect("nobody else knows it");

    let name = ImageName::parse(path).expect("a name");
    let open = |mode, exclusive| {
        let options = OpenOptions { exclusive, ..OpenOptions::new(mode).format("raw") };
        Image::open(&name, &options).map(drop).map_err(|error| error.to_string())
    };
    let refused = |lock: &str| {
        format!(
            "Could not open '{path}': Failed to get {lock} lock\nIs another process using the image [{path}]?"
        )
    };
    let reference = |arguments: &[&str]| {
        let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr)
                .trim_end()
                .trim_start_matches("qemu-img: ")
                .to_owned()),
        }
    };

    assert_eq!(open(OpenMode::Inspect, false), Ok(()));
    assert_eq!(reference(&["info", "-f", "raw", path]), Ok(()));
    assert_eq!(open(OpenMode::Read, false), Ok(()));
    assert_eq!(reference(&["map", "-f", "raw", path]), Ok(()));

    let copy = dir.path().join("copy");
    let copy = copy.to_str().expect("UTF-8");
    assert_eq!(open(OpenMode::Read, true), Err(refused("shared \"write\"")));
    assert_eq!(
        reference(&["convert", "-f", "raw", "-O", "raw", path, copy]),
        Err(refused("shared \"write\""))
    );
    assert_eq!(open(OpenMode::Write, false), Err(refused("\"resize\"")));
    assert_eq!(reference(&["resize", "-f", "raw", path, "2M"]), Err(refused("\"resize\"")));
}
