//! GRUB's configuration. It is a program in a shell language; read here is what distributions generate: variables
//! set to plain words, menu entries, and the kernel, its words and initial file systems in them. What depends on
//! conditions is taken as if it were said outright.

use std::collections::HashMap;

use super::{RawEntry, absolute, volume::Volume};

const FILES: [&str; 4] = ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"];
/// Configurations on an EFI system partition are in a directory named for the distribution.
const EFI: &str = "/EFI";
/// Variables kept, and the longest value: a configuration has a few short ones.
const MAX_VARIABLES: usize = 256;
const MAX_VALUE_BYTES: usize = 4096;

pub(super) fn read(volume: &Volume) -> Vec<RawEntry> {
    let efi = volume.list(EFI).into_iter().map(|name| format!("{EFI}/{name}/grub.cfg"));
    let files = FILES.iter().map(|path| (*path).to_owned()).chain(efi);
    files.filter_map(|path| volume.text(&path)).flat_map(|text| parse(&text)).collect()
}

/// The entries, in the order of the menu.
fn parse(text: &str) -> Vec<RawEntry> {
    let mut variables: HashMap<String, String> = HashMap::new();
    let mut entries: Vec<(RawEntry, Option<String>)> = Vec::new();
    // How deep in braces the open entry is.
    let (mut depth, mut entry_depth) = (0usize, None);
    for line in joined_lines(text) {
        let words = split_words(&line, &variables);
        let Some((command, arguments)) = words.split_first() else { continue };
        let opens = words.last().is_some_and(|word| word == "{");
        match command.as_str() {
            "menuentry" => {
                let title = arguments.first().cloned().unwrap_or_default();
                let id = arguments
                    .iter()
                    .position(|word| matches!(word.as_str(), "--id" | "$menuentry_id_option"));
                let id = id.and_then(|at| arguments.get(at + 1).cloned());
                entries.push((RawEntry { title, ..RawEntry::default() }, id));
                entry_depth = Some(depth);
            }
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|word| word.split_once('='))
                    && value.len() <= MAX_VALUE_BYTES
                    && (variables.len() < MAX_VARIABLES || variables.contains_key(name))
                {
                    variables.insert(name.to_owned(), value.to_owned());
                }
            }
            "linux" | "linux16" | "linuxefi" if entry_depth.is_some() => {
                if let Some((entry, _)) = entries.last_mut()
                    && let Some((kernel, options)) = arguments.split_first()
                {
                    entry.kernel = absolute(kernel, "").unwrap_or_default();
                    entry.options = options.join(" ");
                }
            }
            "initrd" | "initrd16" | "initrdefi" if entry_depth.is_some() => {
                if let Some((entry, _)) = entries.last_mut() {
                    entry.initrds = arguments.iter().filter_map(|path| absolute(path, "")).collect();
                }
            }
            "}" => {
                depth = depth.saturating_sub(1);
                if entry_depth == Some(depth) {
                    entry_depth = None;
                }
            }
            _ => {}
        }
        if opens {
            depth += 1;
        }
    }
    let default = variables.get("default").cloned().unwrap_or_default();
    let entries = entries.into_iter().filter(|(entry, _)| !entry.kernel.is_empty());
    let named = |index: usize, entry: &RawEntry, id: Option<&str>| {
        default.parse() == Ok(index) || entry.title == default || id == Some(&default)
    };
    entries
        .enumerate()
        .map(|(index, (entry, id))| RawEntry { is_default: named(index, &entry, id.as_deref()), ..entry })
        .collect()
}

/// Lines, with those that a backslash continues put together, and without comments.
fn joined_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut continues = false;
    for line in text.lines() {
        let (part, more) = line.strip_suffix('\\').map_or((line, false), |part| (part, true));
        match lines.last_mut() {
            Some(last) if continues => last.push_str(part),
            _ if part.trim_start().starts_with('#') => {
                continues = false;
                continue;
            }
            _ => lines.push(part.to_owned()),
        }
        continues = more;
    }
    lines
}

/// Words as the shell splits them, with variables filled in outside of single quotes. One that is not known is
/// nothing, but for the one that only marks an id.
fn split_words(line: &str, variables: &HashMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = line.chars().peekable();
    let mut quote = None;
    while let Some(letter) = letters.next() {
        match (letter, quote) {
            ('\'', None) | ('"', None) => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (letter, Some(open)) if letter == open => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(letters.next()),
            ('$', None | Some('"')) => {
                let braced = letters.next_if_eq(&'{').is_some();
                let mut name = String::new();
                while let Some(letter) =
                    letters.next_if(|letter| letter.is_ascii_alphanumeric() || *letter == '_')
                {
                    name.push(letter);
                }
                if braced {
                    letters.next_if_eq(&'}');
                }
                let marks_id = name == "menuentry_id_option";
                let value = variables.get(&name).map_or(if marks_id { "--id" } else { "" }, String::as_str);
                if !value.is_empty() {
                    word.get_or_insert_default().push_str(value);
                }
            }
            (letter, None) if letter.is_whitespace() || letter == ';' => words.extend(word.take()),
            (letter, _) => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = r#"
# generated
set default="${saved_entry}"
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
set saved_entry='advanced>second'
set default=1
function load_video {
  insmod all_video
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	search --no-floppy --fs-uuid --set=root 1234
	echo	'Loading Linux ...'
	linux	/boot/vmlinuz-6.1 root=UUID=1234 ro  console=ttyS0,115200 "a b"
	initrd	/boot/initrd.img-6.1
}
submenu 'Advanced options' {
	menuentry 'Second' --id=x {
		linux ($root)/vmlinuz-5.10 root=/dev/vda1 \
			quiet
		initrd /intel.img /initrd-5.10
	}
}
menuentry 'Firmware' {
	fwsetup
}
"#;

    #[test]
    fn what_a_distribution_generates_becomes_entries() {
        let entries = parse(DEBIAN);
        assert_eq!(
            entries.iter().map(|entry| entry.title.as_str()).collect::<Vec<_>>(),
            ["Debian GNU/Linux", "Second"]
        );
        assert_eq!(entries[0].kernel, "/boot/vmlinuz-6.1");
        assert_eq!(entries[0].options, "root=UUID=1234 ro console=ttyS0,115200 a b");
        assert_eq!(entries[0].initrds, ["/boot/initrd.img-6.1"]);
        assert_eq!(entries[1].options, "root=/dev/vda1 quiet");
        assert_eq!(entries[1].initrds, ["/intel.img", "/initrd-5.10"]);
        assert_eq!([entries[0].is_default, entries[1].is_default], [false, true]);
    }

    #[test]
    fn any_text_is_read_to_its_end() {
        for text in [
            "",
            "}",
            "}}}{{{",
            "menuentry",
            "linux",
            "menuentry a {\nlinux\n",
            "set =",
            "set a",
            "$ ${ ' \" \\",
        ] {
            let _: Vec<RawEntry> = parse(text);
        }
        let loops = "set a=$a$a$a$ab\n".repeat(1000);
        assert!(parse(&loops).is_empty());
    }
}
