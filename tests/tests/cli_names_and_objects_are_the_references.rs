//! What stands on the command line around the image: names of every kind, objects, traces.

use img_tests::twin::Twins;

/// File names are bytes. `printf` writes those that are no text, as `sh` has no other way.
const NAMES: &str =
    r#"q=$(printf 'q\377x'); o=$(printf 'o\376x'); d=$(printf 'd\375x'); n=$(printf 'n\374')"#;

#[test]
fn names_that_are_not_text() {
    let mut twins = Twins::new(&[]).without_files();
    for line in [
        r#"create -f qcow2 "$q" 1M"#,
        r#"info "$q""#,
        r#"info --output json "$q""#,
        r#"create -f qcow2 -b "$q" -F qcow2 "$o""#,
        r#"info --backing-chain "$o""#,
        r#"map "$o""#,
        r#"map --output json "$o""#,
        r#"create -f qcow2 -o "data_file=$d" w 1M"#,
        "info w",
        "check w",
        r#"convert "$o" "c$o""#,
        r#"convert -O qcow2 -B "$q" -F qcow2 "$o" "c$q""#,
        r#"compare "$o" "c$o""#,
        r#"snapshot -c "$n" "$q""#,
        r#"snapshot -l "$q""#,
        r#"info --output json "$q""#,
        r#"snapshot -a "$n" "$q""#,
        r#"snapshot -d "$n" "$q""#,
        r#"info "none$q""#,
        r#"info --image-opts "driver=qcow2,file.filename=$o""#,
        r#""$n""#,
        r#"info --output "$n" w"#,
        r#"info -f "$n" w"#,
        r#"create -f qcow2 -o "$n=1" x 1M"#,
        r#"create x "$n""#,
    ] {
        twins.line(&format!("{NAMES}; qemu-img {line}"));
    }
    twins.agree();
}

#[test]
fn names_that_look_like_protocols() {
    Twins::new(&["qemu-img create -q -f qcow2 base 1M"])
        .lines(&[
            "qemu-img create -f qcow2 -b base -F qcow2 file:image:top",
            "qemu-img info file:image:top",
            "qemu-img info --backing-chain --output json file:image:top",
            "qemu-img map file:image:top",
            "qemu-img convert -O qcow2 file:image:top file:an:other",
            "qemu-img compare file:image:top file:an:other",
            "qemu-img info image:top",
        ])
        .agree();
}

#[test]
fn names_with_letters_of_all_kinds() {
    Twins::new(&["qemu-img create -q -f qcow2 'ünï' 1M"])
        .lines(&[
            "qemu-img snapshot -c 'ünïcödé' 'ünï'",
            "qemu-img snapshot -l 'ünï'",
            "qemu-img info --output json 'ünï'",
        ])
        .agree();
}

#[test]
fn structured_names() {
    Twins::new(&["qemu-img create -q -f qcow2 c1 1M", "qemu-img create -q r 1M"])
        .without_files()
        .lines(&[
            r#"qemu-img info "json:{'driver':'qcow2','file':{'driver':'file','filename':'c1'}}""#,
            r#"qemu-img info "json:{'driver':'raw','file.filename':'it\'s'}" 2>&1 | tail -c 30"#,
            "qemu-img info json:",
            r#"qemu-img info 'json:{"driver":"qcow2","file":null}'"#,
            r#"qemu-img info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"c1"},"nope":1}'"#,
            r#"qemu-img info 'json:{"driver":"qcow2","file":{"driver":"file","filename":17}}'"#,
            "qemu-img info --image-opts driver=qcow2,file.filename=c1,l2-cache-size=x",
            "qemu-img info --image-opts driver=qcow2,file.filename=c1,overlap-check=x",
            "qemu-img info --image-opts driver=qcow2,file.filename=c1,file.locking=x",
            "qemu-img info --image-opts driver=qcow2,file.filename=c1,file.aio=native",
            "qemu-img info --image-opts driver=raw,file.filename=r,offset=100M",
            "qemu-img map --output json --image-opts driver=raw,file.filename=r,offset=512",
            "qemu-img map --image-opts driver=raw,file.filename=c1,offset=512",
        ])
        .agree();
}

#[test]
fn objects() {
    let mut twins = Twins::new(&["qemu-img create -q r 1M", "echo -n x > key"]).without_files();
    for object in [
        "secret,id=a,data=x",
        "qom-type=secret,id=a.b-c_1,data=x",
        "'{\"qom-type\":\"secret\",\"id\":\"a\",\"data\":\"x\"}'",
        "secret,id=a,file=key",
        "secret,id=a,file=none",
        "secret,id=a",
        "secret,data=x",
        "secret,id=1a,data=x",
        "secret,id=a,data=x,file=key",
        "secret,id=a,data=x,nope=1",
        "secret,id=a,data=x,format=zz",
        "secret,id=a,data=x --object secret,id=a,data=y",
        "secret,foo",
        "id=a",
        "nope,id=a",
        "''",
        "'{\"qom-type\":\"secret\",\"id\":\"a\",\"data\":7}'",
        "secret,help",
    ] {
        twins.line(&format!("qemu-img info --object {object} r"));
        twins.line(&format!("qemu-img compare --object {object} r r"));
    }
    twins.agree();
}

#[test]
fn traces() {
    Twins::new(&["qemu-img create -q r 1M"])
        .without_files()
        .lines(&[
            "qemu-img -T nope info -f raw r",
            "qemu-img --trace enable=nope,file=tr info r",
            "qemu-img -T events=nofile info r",
            "qemu-img -T foo=1 info r",
            "qemu-img -T '' info r",
            "qemu-img -T help info r >/dev/null",
        ])
        .agree();
}
