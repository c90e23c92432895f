//! Entries of the Boot Loader Specification, type 1: a small file each.

use super::{RawEntry, absolute, volume::Volume};

/// Where the entries are, on an EFI system partition or in a root file system.
const DIRECTORIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];

/// All entries of a volume, the newest version first, as boot loaders show them.
pub(super) fn read(volume: &Volume) -> Vec<RawEntry> {
    let mut entries = Vec::new();
    for dir in DIRECTORIES {
        for name in volume.list(dir).into_iter().rev().filter(|name| name.ends_with(".conf")) {
            let text = volume.text(&format!("{dir}/{name}"));
            entries.extend(text.and_then(|text| parse(&text)));
        }
    }
    entries
}

/// One entry. What an entry says with a `$` is GRUB's to fill in, and left out.
fn parse(text: &str) -> Option<RawEntry> {
    let mut entry = RawEntry::default();
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "linux" => entry.kernel = absolute(value, "")?,
            "initrd" => {
                let paths = value.split_whitespace().filter(|path| !path.starts_with('$'));
                entry.initrds.extend(paths.filter_map(|path| absolute(path, "")));
            }
            "options" => {
                for word in value.split_whitespace().filter(|word| !word.starts_with('$')) {
                    if !entry.options.is_empty() {
                        entry.options.push(' ');
                    }
                    entry.options.push_str(word);
                }
            }
            _ => {}
        }
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_the_specification_says() {
        let text = "# comment\ntitle      Fedora Linux (6.5)\nversion 6.5\nlinux /vmlinuz-6.5\n\
                    initrd /initramfs-6.5.img $tuned_initrd\noptions root=UUID=1 ro\noptions quiet $kernelopts\n";
        let entry = parse(text).expect("a kernel");
        assert_eq!(entry.title, "Fedora Linux (6.5)");
        assert_eq!(
            (entry.kernel.as_str(), entry.initrds.as_slice()),
            ("/vmlinuz-6.5", &["/initramfs-6.5.img".into()][..])
        );
        assert_eq!(entry.options, "root=UUID=1 ro quiet");
        assert_eq!(parse("title without a kernel\n"), None);
    }
}
