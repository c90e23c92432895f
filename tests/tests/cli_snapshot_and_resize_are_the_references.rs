//! `snapshot` and `resize`.

use img_tests::twin::Twins;

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
        "qemu-img check s",
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
