//! `docs/QEMU_IMG.md` says what of the reference there is. Its tables are made here, from the help of the installed
//! reference and of `img` and from what both answer, and the page in the repository has to say the same:
//! `IMG_TEST_WRITE=1 cargo test -p img-tests --test every_option_of_the_reference_is_accepted_or_named` writes it anew.
//!
//! An option counts as accepted when `img` takes it; where the reference takes what its help says, and the command line
//! asks for nothing else, both must give the same answer. What is not accepted has to be refused by its name.

use std::{collections::BTreeSet, env, fmt::Write as _, fs, path::Path};

use img_tests::command::{Output, Run, img, img_binary, qemu_img};

/// What the tables stand behind.
const TABLES_BEGIN: &str = "<!-- What follows is written by a test. -->\n";

/// In front of the formats that are not there.
const REFUSED: &str = "Refused by name: ";

/// What stands between backticks.
fn names_in(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// An option as a help text shows it.
#[derive(Clone, Debug)]
struct Opt {
    /// `-f`, `--format`, or `bs=`.
    names: Vec<String>,
    /// What follows the name, where something does.
    value: Option<String>,
}

impl Opt {
    fn shown(&self) -> String {
        let value = self.value.as_ref().map_or(String::new(), |value| {
            let space = if self.names[0].ends_with('=') { "" } else { " " };
            format!("{space}{}", value.replace('|', "\\|"))
        });
        format!("`{}{value}`", self.names.join(", "))
    }
}

/// The options of a command in its help text; those of getopt and the operands of `dd`.
fn options(help: &str) -> Vec<Opt> {
    let (_, list) = help.split_once("Arguments:").expect("a list behind the usage");
    let mut options = Vec::new();
    for line in list.lines().filter(|line| line.starts_with(' ')) {
        let line = line.trim();
        let is_operand = line.split_once('=').is_some_and(|(name, value)| {
            name.chars().all(|c| c.is_ascii_lowercase())
                && value.starts_with(|c: char| c.is_ascii_uppercase())
        });
        if is_operand {
            let (name, value) = line.split_once('=').expect("just seen");
            options.push(Opt { names: vec![format!("{name}=")], value: Some(value.to_owned()) });
        } else if line.starts_with('-') && !line.starts_with("- ") {
            options.extend(options_of_line(line));
        }
    }
    // What help shows of itself is no option of the command.
    options.retain(|option| !option.names.iter().any(|name| name == "--help"));
    options
}

/// `-f, --format FMT` is one option, `--enable, --disable` are two.
fn options_of_line(line: &str) -> Vec<Opt> {
    let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    let names: Vec<String> =
        words.iter().take_while(|word| word.starts_with('-')).map(|word| (*word).to_owned()).collect();
    let value = words.get(names.len()).map(|value| (*value).to_owned());
    if names.len() > 1 && names.iter().all(|name| name.starts_with("--")) {
        return names.into_iter().map(|name| Opt { names: vec![name], value: None }).collect();
    }
    vec![Opt { names, value }]
}

/// A value that makes sense where the help says `placeholder`.
fn example(placeholder: &str) -> &'static str {
    const EXAMPLES: &[(&str, &str)] = &[
        ("FMT", "raw"),
        ("CACHE", "none"),
        ("OBJDEF", "secret,id=s,data=x"),
        ("json", "json"),
        ("OPT", "help"),
        ("TGT_OPTS", "size=1M"),
        ("SNAPSHOT", "one"),
        ("AIO", "threads"),
        ("PREALLOC", "off"),
        ("leaks", "all"),
        ("SIZE", "4096"),
        ("OFFSET", "4096"),
        ("LENGTH", "4096"),
        ("FILE", "none"),
    ];
    EXAMPLES.iter().find(|(part, _)| placeholder.contains(part)).map_or("1", |(_, value)| value)
}

/// The words of a command line with that option and nothing else, by each of its names.
fn command_lines(command: &str, option: &Opt) -> Vec<Vec<String>> {
    let value = option.value.as_deref().map(example);
    let line = |name: &String| {
        let mut words = vec![command.to_owned()];
        match (name.strip_suffix('='), value) {
            (Some(_), value) => words.push(format!("{name}{}", value.unwrap_or_default())),
            (None, Some(value)) => words.extend([name.clone(), value.to_owned()]),
            (None, None) => words.push(name.clone()),
        }
        words
    };
    option.names.iter().map(line).collect()
}

/// Whether getopt does not know the option, or reads it otherwise than its help says.
fn is_unknown(answer: &Output) -> bool {
    ["unrecognized option", "invalid option", "option requires an argument", "doesn't allow an argument"]
        .iter()
        .any(|words| answer.stderr.contains(words))
}

/// Whether the reference takes no value where its help and its short option have one: the value is then a file name.
fn is_read_otherwise_there(line: &[String]) -> bool {
    line[0] == "snapshot" && ["--create", "--apply", "--delete"].contains(&line[1].as_str())
}

/// Names of commands, or of formats, in the reference's help.
fn listed<'a>(help: &'a str, title: &str) -> Vec<&'a str> {
    let (_, list) = help.split_once(title).unwrap_or_else(|| panic!("no {title:?} in {help}"));
    list.trim_start_matches(|c| c != '\n')
        .trim_start()
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .lines()
        .collect()
}

/// A directory with a link to `img` that has the reference's name.
struct Workplace(tempfile::TempDir);

impl Workplace {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(directory.path().join("bin")).expect("a directory");
        std::os::unix::fs::symlink(img_binary(), directory.path().join("bin/qemu-img")).expect("a link");
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn theirs(&self, words: &[impl AsRef<str>]) -> Output {
        qemu_img(self.path(), words.iter().map(AsRef::as_ref)).output()
    }

    /// `img` under the reference's name.
    fn ours(&self, words: &[impl AsRef<str>]) -> Output {
        Run::new(self.path().join("bin/qemu-img"), self.path()).args(words.iter().map(AsRef::as_ref)).output()
    }

    fn help(&self, command: &str) -> (Vec<Opt>, Vec<Opt>) {
        let theirs = self.theirs(&[command, "--help"]).success();
        let ours = img(self.path(), [command, "--help"]).output().success();
        (options(&theirs), options(&ours))
    }
}

/// The row of a command: what is accepted, refused, added.
fn command_row(workplace: &Workplace, command: &str, problems: &mut String) -> String {
    let (theirs, ours) = workplace.help(command);
    let mut columns = [Vec::new(), Vec::new(), Vec::new()];
    for option in &theirs {
        let mut is_accepted = true;
        for line in command_lines(command, option) {
            let (their_answer, our_answer) = (workplace.theirs(&line), workplace.ours(&line));
            // A help text may leave out that there is a value.
            let wants_value = [&their_answer, &our_answer]
                .iter()
                .all(|answer| answer.stderr.contains("requires an argument"));
            if is_unknown(&our_answer) && !wants_value {
                is_accepted = false;
                if !our_answer.stderr.contains(option.names[0].trim_start_matches('-')) {
                    writeln!(problems, "{option:?} is refused without being named: {our_answer}")
                        .expect("a string");
                }
            } else if !is_unknown(&their_answer) && !is_read_otherwise_there(&line) {
                let here = format!("{}/bin/", workplace.path().display());
                let [theirs, ours] = [&their_answer, &our_answer]
                    .map(|answer| (answer.code, answer.stdout.clone(), answer.stderr.replace(&here, "")));
                if theirs != ours {
                    writeln!(problems, "{line:?}\ntheirs: {their_answer}\nours: {our_answer}")
                        .expect("a string");
                }
            }
        }
        columns[usize::from(!is_accepted)].push(option.shown());
    }
    let known: BTreeSet<&String> = theirs.iter().flat_map(|option| &option.names).collect();
    for option in &ours {
        let is_theirs = option.names.iter().any(|name| {
            let plain = name.split(['[', '=', '.']).next().unwrap_or_default();
            // The reference's help leaves some names out, and shortens some.
            known.iter().any(|known| *known == plain)
                || !is_unknown(&workplace.theirs(&[command, plain, "1"]))
        });
        if !is_theirs {
            columns[2].push(option.shown().replace(['<', '>'], "").replace("...", ""));
        }
    }
    let [accepted, refused, added] =
        columns.map(|column| if column.is_empty() { "—".to_owned() } else { column.join(" ") });
    format!("| `{command}` | {accepted} | {refused} | {added} |\n")
}

/// What becomes of a format's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Support {
    MadeAndOpened,
    /// A protocol in the place of a format, which neither program makes.
    Opened,
    RefusedByName,
}

/// Whether `img` makes or opens images of a format.
fn support(workplace: &Workplace, format: &str, problems: &mut String) -> Support {
    let create = workplace.ours(&["create", "-q", "-f", format, &format!("new.{format}"), "1M"]);
    let open = workplace.ours(&["info", "-f", format, "nothing"]);
    let refusal = format!("The format '{format}' is not supported yet");
    let not_made = format!("Format driver '{format}' does not support image creation");
    match (create.code, open.stderr.contains(&refusal)) {
        (0, false) => Support::MadeAndOpened,
        (_, false)
            if create.stderr.contains(&not_made)
                && workplace
                    .theirs(&["create", "-q", "-f", format, "x", "1M"])
                    .stderr
                    .contains(&not_made) =>
        {
            Support::Opened
        }
        (_, true) if create.stderr.contains(&refusal) => Support::RefusedByName,
        _ => {
            writeln!(problems, "{format} is neither supported nor refused by name:\n{create}\n{open}")
                .expect("a string");
            Support::RefusedByName
        }
    }
}

/// The names in `-o help`.
fn option_names(help: &str) -> Vec<&str> {
    let options = help.lines().filter_map(|line| line.strip_prefix("  ")?.split_once("=<"));
    options.map(|(name, _)| name).collect()
}

/// The row of a format: create options that both have, that are refused, and that only `img` has.
fn create_options_row(workplace: &Workplace, format: &str, problems: &mut String) -> String {
    let words = ["create", "-f", format, "-o", "help", "x"];
    let theirs = workplace.theirs(&words).success();
    let ours = img(workplace.path(), words).output().success();
    let (theirs, ours) = (option_names(&theirs), option_names(&ours));
    let mut columns = [Vec::new(), Vec::new(), Vec::new()];
    for name in &theirs {
        let value = if name.starts_with("encrypt") && !name.ends_with("time") { "on" } else { "1" };
        let list = format!("{name}={value}");
        let answer = workplace.ours(&["create", "-q", "-f", format, "-o", &list, "refused", "1M"]);
        let is_refused = answer.stderr.contains(&format!("the option '{name}' is not supported"));
        if answer.stderr.contains(&format!("Invalid parameter '{name}'")) {
            writeln!(problems, "{format}: {name} is refused as if it did not exist: {answer}")
                .expect("a string");
        }
        columns[usize::from(is_refused)].push(format!("`{name}`"));
    }
    columns[2].extend(ours.iter().filter(|name| !theirs.contains(name)).map(|name| format!("`{name}`")));
    let [accepted, refused, added] =
        columns.map(|column| if column.is_empty() { "—".to_owned() } else { column.join(" ") });
    format!("| {format} | {accepted} | {refused} | {added} |\n")
}

#[test]
fn every_option_of_the_reference_is_accepted_or_named() {
    let workplace = Workplace::new();
    let help = workplace.theirs(&["--help"]).success();
    let mut problems = String::new();

    let version = workplace.theirs(&["--version"]).success();
    let version = version.split_whitespace().nth(2).expect("qemu-img version NUMBER");
    let made_with = format!("\nMade with qemu-img {version}.\n");

    let mut tables = format!(
        "{made_with}\n## Commands and their options\n\n\
        | command | accepted | refused by name | only in `img` |\n| --- | --- | --- | --- |\n"
    );
    let commands: Vec<&str> = listed(&help, "Recognized commands")
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() >= 15, "{commands:?}");
    for command in &commands {
        tables += &command_row(&workplace, command, &mut problems);
    }
    let own = img(workplace.path(), ["--help"]).output().success();
    let own = listed(&own, "Commands:");
    let added: Vec<String> = own
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| !commands.contains(name))
        .map(|name| format!("`{name}`"))
        .collect();
    writeln!(tables, "\nCommands that only `img` has: {}.", added.join(", ")).expect("a string");

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/QEMU_IMG.md");
    let page = fs::read_to_string(&path).expect("the page");
    let (text, written) = page.split_once(TABLES_BEGIN).expect("the page has its tables");

    tables += "\n## Formats and protocols\n\n";
    let mut formats: BTreeSet<&str> =
        listed(&help, "Supported image formats").iter().flat_map(|line| line.split_whitespace()).collect();
    assert!(formats.len() > 20, "{formats:?}");
    // Which protocols a build of the reference has depends on the libraries that it was built with.
    formats.extend(
        written.lines().find_map(|line| line.strip_prefix(REFUSED)).iter().flat_map(|names| names_in(names)),
    );
    let support: Vec<(&str, Support)> =
        formats.iter().map(|format| (*format, support(&workplace, format, &mut problems))).collect();
    let with = |wanted: Support| {
        support.iter().filter(|(_, found)| *found == wanted).map(|(format, _)| *format).collect::<Vec<_>>()
    };
    let supported = with(Support::MadeAndOpened);
    writeln!(tables, "Read and written: `{}`.", supported.join("`, `")).expect("a string");
    writeln!(
        tables,
        "\nOpened, and not made by the reference either: `{}`.",
        with(Support::Opened).join("`, `")
    )
    .expect("a string");
    writeln!(tables, "\n{REFUSED}`{}`.", with(Support::RefusedByName).join("`, `")).expect("a string");

    tables += "\n## Options of new images (`create -o`)\n\n\
        | format | accepted | refused by name | only in `img` |\n| --- | --- | --- | --- |\n";
    for format in supported {
        tables += &create_options_row(&workplace, format, &mut problems);
    }
    assert!(problems.is_empty(), "{problems}");

    // The help of another release has other words: there, what it offers is accepted or named, and no more is said.
    if env::var_os("IMG_TEST_WRITE").is_some() {
        fs::write(&path, format!("{text}{TABLES_BEGIN}{tables}")).expect("the page is written");
    } else if written.starts_with(&made_with) {
        for (in_page, now) in written.lines().zip(tables.lines()) {
            assert_eq!(
                in_page, now,
                "docs/QEMU_IMG.md says other than the programs; the head of this test tells how it is written anew"
            );
        }
        assert_eq!(written.lines().count(), tables.lines().count(), "docs/QEMU_IMG.md has other lines");
    }
}
