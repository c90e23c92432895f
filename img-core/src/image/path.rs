//! File names as text: protocols in front, and names relative to the file that gives them.

/// What stands before the first `:`, when that comes before any `/`: the protocol.
#[must_use]
pub fn protocol(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    (name.as_bytes()[end] == b':').then(|| &name[..end])
}

/// The name by which the backing file `backing` of the image called `image` is opened: absolute names,
/// names with a protocol (`json:` too) and names given by an image that has no directory stand as they
/// are; others are relative to the directory of `image`.
#[must_use]
pub fn full_backing_name(image: &str, backing: &str) -> String {
    if backing.starts_with('/') || protocol(backing).is_some() {
        return backing.to_owned();
    }
    let behind_protocol = protocol(image).map_or(0, |protocol| protocol.len() + 1);
    let directory_end = image.rfind('/').map_or(0, |slash| slash + 1).max(behind_protocol);
    format!("{}{backing}", &image[..directory_end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_stands_before_the_first_colon_unless_a_slash_comes_first() {
        assert_eq!(protocol("fd:x"), Some("fd"));
        assert_eq!(protocol("./fd:x"), None);
        assert_eq!(protocol("file:/a"), Some("file"));
        assert_eq!(protocol("plain"), None);
        assert_eq!(protocol("json:{\"a\":1}"), Some("json"));
    }

    #[test]
    fn backing_names_are_relative_to_the_image_that_gives_them() {
        for (image, backing, full) in [
            ("sub/o.qcow2", "nope", "sub/nope"),
            ("o.qcow2", "a", "a"),
            ("/x/y/o.qcow2", "../a", "/x/y/../a"),
            ("sub/o.qcow2", "/abs/a", "/abs/a"),
            ("sub/o.qcow2", "file:../a", "file:../a"),
            ("sub/o.qcow2", "json:{}", "json:{}"),
            ("file:o.qcow2", "a", "file:a"),
            ("file:sub/o.qcow2", "a", "file:sub/a"),
        ] {
            assert_eq!(full_backing_name(image, backing), full, "{image} {backing}");
        }
    }
}
