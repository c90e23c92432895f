//! `snapshot` and `resize`.

use img_tests::{command::shell, twin::Twins};

#[test]
fn snapshot() {
    Twins::new(&[
        "qemu-img create -q -f qcow2 s 64M && qemu-io -c 'write -P 1 0 1M' s >/dev/null",
        "qemu-img create -q r 1M",
        "qemu-img create -q -f qcow2 -u -b gone -F raw e 1M",
        "qemu-img create -q -f qcow2 bm 1M && qemu-img snapshot -c s1 bm && qemu-img bitmap --add bm b0",
        "qemu-img create -q -f qcow2 -o compat=0.10 v2 1M",
        "qemu-img create -q -f qcow2 -o data_file=x.data x 1M",
    ])
    // Tables shorter than a cluster take less space on the host than the reference's.
    .without_disk_use()
    .lines(&[
        "qemu-img snapshot s",
        "qemu-img snapshot -l s",
        "qemu-img snapshot -c x s",
        "qemu-img snapshot s",
        "qemu-io -c 'write -P 2 0 128k' s >/dev/null",
        "qemu-img snapshot -c x s",
        "qemu-img snapshot -c 7 s",
        "qemu-img snapshot -l s",
        "qemu-img snapshot -a none s",
        "qemu-img snapshot -d none s",
        "qemu-img snapshot -a 1 s",
        "qemu-img snapshot -d x s",
        "qemu-img snapshot -l s",
        "qemu-img snapshot -c '' s",
        "qemu-img snapshot -d '' s",
        "qemu-img snapshot -q -c qq s",
        "qemu-img snapshot -q -l s",
        "qemu-img snapshot -a 7 s",
        "qemu-img snapshot -d 7 s",
        "qemu-img snapshot --image-opts -c io driver=qcow2,file.filename=s",
        "qemu-img snapshot -f qcow2 -d io s",
        "qemu-img snapshot -U -c y s",
        "qemu-img snapshot -U -l s",
        "qemu-img snapshot -l r",
        "qemu-img snapshot -c x r",
        "qemu-img snapshot -a x -f raw r",
        "qemu-img snapshot -d x -f raw r",
        "qemu-img snapshot none",
        "qemu-img snapshot -f nope s",
        "qemu-img snapshot -l e",
        "qemu-img snapshot -c y e",
        // Refused; the reference writes its bitmaps anew all the same.
        "cp bm t; qemu-img snapshot -a s1 t; code=$?; rm t; exit $code",
        "qemu-img snapshot -c x v2",
        "qemu-img snapshot -l v2",
        "qemu-img snapshot -c x x",
        "qemu-img snapshot -a x x",
        "qemu-img snapshot -d x x",
        // Refused before the snapshot is looked for.
        "cp bm t; qemu-img snapshot -a none t; code=$?; rm t; exit $code",
        "qemu-img check s",
    ])
    .agree();
}

/// A disk without a byte has an L1 table without an entry, which stands nowhere.
#[test]
fn snapshots_of_an_empty_disk() {
    Twins::new(&["qemu-img create -q -f qcow2 e 0", "qemu-img create -q -f qcow2 -o compat=0.10 old 0"])
        .without_files()
        .lines(&[
            "qemu-img snapshot -c one e",
            "qemu-img snapshot -c one old",
            "qemu-img resize -q e 1M && qemu-io -c 'write -q -P 1 0 64k' e",
            "qemu-img snapshot -c two e",
            "qemu-img snapshot -a one e",
            "qemu-img info e | grep 'virtual\\|corrupt'",
            "qemu-img snapshot -a two e && qemu-io -c 'read -q -P 1 0 64k' e",
            "qemu-img snapshot -d one e",
            "qemu-img snapshot -l e | cut -c1-30",
            "qemu-img check -q e && qemu-img check -q old",
        ])
        .agree();
}

/// A snapshot whose L1 table cannot be where the entry says: it is listed, and refused where it is used.
#[test]
fn snapshots_that_cannot_be_used() {
    Twins::new(&[
        "qemu-img create -q -f qcow2 o 16M && qemu-io -c 'write 0 64k' o >/dev/null",
        "qemu-img snapshot -c one o && qemu-img snapshot -c two o && cp o l",
        // The entry of the first: where its L1 table is, and the number of its entries.
        r"t=$(od -An -j64 -N8 -tu8 --endian=big o | tr -d ' ') && echo $t &&
          printf '\2' | dd of=o bs=1 seek=$((t + 6)) conv=notrunc status=none &&
          printf '\100\0\1' | dd of=l bs=1 seek=$((t + 9)) conv=notrunc status=none",
    ])
    .without_disk_use()
    .lines(&[
        "qemu-img snapshot -l o",
        "qemu-img snapshot -l l",
        "qemu-img info o",
        "qemu-img info --output=json l",
        "qemu-img snapshot -d one o",
        "qemu-img snapshot -d one l",
        "qemu-img convert -l one -O raw o out",
        "qemu-img convert -l snapshot.name=one -O raw l out",
        "qemu-img convert -l two -O raw o out",
        "qemu-img snapshot -d two o",
        "qemu-img snapshot -l o",
    ])
    .agree();
}

/// How much host space a grown image takes is left out here.
#[test]
fn resize_with_preallocation() {
    Twins::new(&["qemu-img create -q -f qcow2 s 64M"])
        .without_files()
        .lines(&[
            "qemu-img resize s --preallocation=falloc +1M",
            "qemu-img resize s --preallocation=full +1M",
            "qemu-img check -q s",
        ])
        .agree();
}

#[test]
fn resize() {
    Twins::new(&[
        "qemu-img create -q -f qcow2 s 64M && qemu-io -c 'write -P 1 0 1M' -c 'write 50M 1M' s >/dev/null",
        "qemu-img create -q r 1M",
        "qemu-img create -q -f qcow2 -b r -F raw o 512k",
    ])
    .lines(&[
        "qemu-img resize s 10M",
        "qemu-img resize s -10M",
        "qemu-img resize --shrink s -10M",
        "qemu-img resize s -100G --shrink",
        "qemu-img resize s +1M",
        "qemu-img resize -q s +1M",
        "qemu-img resize s foo",
        "qemu-img resize s +foo",
        "qemu-img resize s 0",
        "qemu-img resize s 8E",
        "qemu-img resize s +8E",
        "qemu-img resize none 1M",
        "qemu-img resize s --preallocation=falloc -1M",
        "qemu-img resize s --preallocation=falloc +0",
        "qemu-img resize s +1",
        "qemu-img resize s +1k",
        "qemu-img resize --shrink s 20M",
        "qemu-img resize r +1",
        "qemu-img resize -f raw r 2M",
        "qemu-img resize -f raw r --preallocation=full 3M",
        "qemu-img resize -f raw r --preallocation=metadata 4M",
        "qemu-img resize -f raw r 7E",
        "qemu-img resize -f raw --shrink r 1k",
        "qemu-img resize -f nope r 1k",
        "qemu-img resize --image-opts driver=raw,file.filename=r 5k",
        "qemu-img resize o 1M",
        "qemu-img resize --preallocation=metadata o 2M",
        "qemu-img map --output json o",
        "qemu-img resize --preallocation=metadata s +4M",
        "qemu-img map --output json s",
        "qemu-img check s",
    ])
    .agree();
}

/// A disk that ends inside a cluster without a place grows inside that cluster first.
#[test]
fn the_last_cluster_of_the_old_disk_is_preallocated_too() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let run = |line: &str| shell(directory.path(), line).success();
    for options in ["", "-o extended_l2=on", "-o compat=0.10", "-o data_file=d"] {
        for mode in ["metadata", "falloc", "full"] {
            for (write, read) in [
                ("write -P 7 100k 300k", "read -q -P 7 100k 300k"),
                ("write -P 7 0 900k", "read -q -P 7 0 900k"),
                ("write -z 900k 100k", "read -q -P 0 0 1000k"),
            ] {
                let line = format!(
                    "qemu-img create -q -f qcow2 {options} t 1000k && qemu-io -c '{write}' t >/dev/null && \
                     $img resize -q -f qcow2 --preallocation={mode} t 3M && qemu-img check -q t && \
                     qemu-io -r -c '{read}' -c 'read -q -P 0 1000k 2072k' t && qemu-img map --output=json t"
                );
                let map: serde_json::Value = serde_json::from_str(&run(&line)).expect(&line);
                let extents = map.as_array().expect("a list");
                let end = |extent: &serde_json::Value| {
                    extent["start"]
                        .as_u64()
                        .zip(extent["length"].as_u64())
                        .map(|(start, length)| start + length)
                };
                let grown = extents.iter().filter(|extent| end(extent) > Some(1000 << 10));
                assert!(
                    grown.clone().count() > 0 && grown.clone().all(|extent| extent["data"] == true),
                    "{line}: {map}"
                );
            }
        }
    }
    // What shows of the backing file goes on showing.
    run("qemu-img create -q -f raw base 3M && qemu-io -f raw -c 'write -P 3 0 3M' base");
    for mode in ["metadata", "falloc", "full"] {
        run(&format!(
            "qemu-img create -q -f qcow2 -b base -F raw t 1000k && \
             $img resize -q -f qcow2 --preallocation={mode} t 2000k && \
             qemu-io -r -c 'read -q -P 3 0 1000k' -c 'read -q -P 0 1000k 1000k' t"
        ));
    }
}

#[test]
fn a_data_file_shrinks_with_its_disk() {
    let mut twins = Twins::new(&[]).without_files();
    for options in ["data_file=d", "data_file=d,data_file_raw=on"] {
        twins.lines(&[
            &format!("qemu-img create -q -f qcow2 -o {options} t 1M && qemu-io -c 'write -P 7 100k 300k' t >/dev/null"),
            "qemu-img resize -q --shrink t 200k && stat -c %s d",
            "qemu-img resize -q t 400k",
            "qemu-io -r -c 'read -q -P 7 100k 100k' -c 'read -q -P 0 200k 200k' t",
        ]);
    }
    twins.agree();
}
