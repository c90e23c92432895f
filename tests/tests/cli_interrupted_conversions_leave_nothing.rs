//! A conversion that is interrupted removes the file it made, and says so by its exit code; one that prints
//! JSON can be read line by line.

use img_tests::command::{Run, img_binary};

fn shell(line: &str, directory: &std::path::Path) -> Run {
    Run::new("sh", directory).args(["-c", line, "sh"]).arg(img_binary())
}

#[test]
fn a_new_target_is_removed() {
    let root = tempfile::tempdir().unwrap();
    // Slow enough to be met at work: 64 MiB at 1 MiB a second. The signal comes once the target is there.
    let line = "truncate -s 64M r && dd if=/dev/urandom of=r bs=1M count=64 conv=notrunc 2>/dev/null; \
        \"$1\" convert -q -r 1M -O qcow2 r new & pid=$!; \
        while [ ! -e new ]; do kill -0 $pid || exit 99; done; kill -INT $pid; wait $pid";
    let output = shell(line, root.path()).output();
    assert_eq!(output.code, 130, "{output}");
    assert!(!root.path().join("new").exists());
    assert!(root.path().join("r").exists());
}

/// One request to stop is enough, whoever is waited for: a pipe that nobody writes to, and one that brings no more.
#[test]
fn waiting_for_a_source_ends() {
    let root = tempfile::tempdir().unwrap();
    let line = "mkfifo p && { \"$1\" convert -f raw -O raw p new & pid=$!; \
        until grep -qs signals /proc/$pid/task/*/comm; do kill -0 $pid || exit 99; done; \
        kill -INT $pid; wait $pid; echo $?; }; \
        sleep 60 >p & writer=$!; \"$1\" convert -f raw -O raw p new & pid=$!; \
        while [ ! -e new ]; do kill -0 $pid || exit 99; done; kill -TERM $pid; wait $pid; echo $?; \
        kill $writer; ls";
    let run = Run::new("timeout", root.path()).args(["50", "sh", "-c", line, "sh"]).arg(img_binary());
    assert_eq!(run.output().success(), "130\n143\np\n");
}

#[test]
fn progress_as_json_is_one_object_a_line() {
    let root = tempfile::tempdir().unwrap();
    let line = "truncate -s 4M r && \"$1\" convert --progress=json -f raw -O qcow2 r o";
    let text = shell(line, root.path()).output().success();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let last = lines.last().expect("at least the end is told");
    assert_eq!(last["event"], "finished");
    assert_eq!((&last["done"], &last["total"]), (&last["total"], &last["done"]));
    assert!(last["elapsed_ms"].is_u64());
}

#[test]
fn the_writing_of_space_is_told() {
    let root = tempfile::tempdir().unwrap();
    for line in [
        "\"$1\" create -f qcow2 -o preallocation=full --progress=json c 8M",
        "\"$1\" create -q -f qcow2 r 1M && \"$1\" resize --preallocation=full --progress=json r 9M",
    ] {
        let text = shell(line, root.path()).output().success();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        assert!(lines.len() > 2, "{text}");
        let last = lines.last().expect("at least the end is told");
        assert_eq!((&last["event"], &last["done"]), (&"finished".into(), &(8 << 20).into()), "{text}");
    }
}
