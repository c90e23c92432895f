//! Names of images as texts: which protocol, which directory, what a relative name is relative to.

use img_core::{
    format::registry,
    image::{self, protocol},
};

/// # Errors
/// When `name` names a protocol that new files cannot be made through.
pub(crate) fn check_protocol(name: &str) -> Result<(), String> {
    match protocol(name) {
        None | Some("file") => Ok(()),
        // A protocol in the place of a format is a driver too.
        Some(protocol) if registry::by_name(protocol).is_some_and(|driver| !driver.can_create()) => {
            Err(format!("Protocol driver '{protocol}' does not support image creation"))
        }
        Some(protocol) => Err(format!("Unknown protocol '{protocol}'")),
    }
}

/// The path of a plain name.
pub(crate) fn path(name: &str) -> &str {
    name.strip_prefix("file:").unwrap_or(name)
}

/// The backing file called `backing` in the image called `image`.
///
/// # Errors
/// In the reference's words, where a relative name has nothing to be relative to.
pub(crate) fn full_backing_name(image: &str, backing: &str) -> Result<String, String> {
    let is_relative = protocol(backing).is_none() && !backing.starts_with('/');
    if is_relative && (image.is_empty() || image.starts_with("json:")) {
        return Err(format!("Cannot use relative backing file names for '{image}'"));
    }
    Ok(image::full_backing_name(image, backing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_are_relative_to_their_image() {
        for (image, backing, full) in [
            ("a", "b", "b"),
            ("d/a", "../b", "d/../b"),
            ("d/a", "/b", "/b"),
            ("d/a", "nbd:localhost:1", "nbd:localhost:1"),
            ("d/a", "./x:y", "d/./x:y"),
            ("file:a", "b", "file:b"),
            ("/x/a", "json:{}", "json:{}"),
        ] {
            assert_eq!(full_backing_name(image, backing).unwrap(), full);
        }
        assert!(full_backing_name("json:{}", "b").is_err());
    }

    #[test]
    fn only_files_are_made() {
        assert_eq!(check_protocol("file:x"), Ok(()));
        assert_eq!(check_protocol("./nope:x"), Ok(()));
        assert_eq!(check_protocol("nope:x"), Err("Unknown protocol 'nope'".into()));
    }
}
