//! The configuration of extlinux and U-Boot's distribution boot: labels with their lines.

use super::{RawEntry, absolute, volume::Volume};

const FILES: [&str; 5] = [
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
];

pub(super) fn read(volume: &Volume) -> Vec<RawEntry> {
    let files = FILES.iter().filter_map(|path| Some((*path, volume.text(path)?)));
    files.flat_map(|(path, text)| parse(&text, path.rsplit_once('/').map_or("", |(dir, _)| dir))).collect()
}

/// The entries of a file in `dir`.
fn parse(text: &str, dir: &str) -> Vec<RawEntry> {
    let mut default = String::new();
    let mut labels: Vec<(String, RawEntry)> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        let key = key.to_ascii_lowercase();
        match (key.as_str(), labels.last_mut()) {
            ("default", _) => default = value.to_owned(),
            ("label", _) => {
                labels.push((value.to_owned(), RawEntry { title: value.to_owned(), ..RawEntry::default() }))
            }
            ("menu", Some((_, entry))) => {
                if let Some(title) = value.strip_prefix("label ").or(value.strip_prefix("LABEL ")) {
                    entry.title = title.trim().replace('^', "");
                }
            }
            ("kernel" | "linux", Some((_, entry))) => entry.kernel = absolute(value, dir).unwrap_or_default(),
            ("initrd", Some((_, entry))) => {
                entry.initrds = value.split(',').filter_map(|path| absolute(path.trim(), dir)).collect();
            }
            ("append", Some((_, entry))) => entry.options = value.to_owned(),
            _ => {}
        }
    }
    let entries = labels.into_iter().filter(|(_, entry)| !entry.kernel.is_empty());
    entries.map(|(label, entry)| RawEntry { is_default: label == default, ..entry }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_entries() {
        let text = "DEFAULT lts\nTIMEOUT 10\nLABEL virt\n  MENU LABEL ^Linux virt\n  LINUX vmlinuz-virt\n\
                    \x20 INITRD initramfs-virt\n  APPEND root=UUID=1 quiet\nLABEL lts\n  KERNEL ../vmlinuz-lts\nLABEL none\n";
        let entries = parse(text, "/boot/extlinux");
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[0].title.as_str(), entries[0].kernel.as_str()),
            ("Linux virt", "/boot/extlinux/vmlinuz-virt")
        );
        assert_eq!(entries[0].initrds, ["/boot/extlinux/initramfs-virt"]);
        assert_eq!((entries[1].kernel.as_str(), entries[1].is_default), ("/boot/vmlinuz-lts", true));
    }
}
