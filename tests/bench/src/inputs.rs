//! The images the rows work on, generated once into the working directory.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// How big the inputs are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Guest bytes of the disk.
    pub(crate) disk_bytes: u64,
    /// Bytes of data in it.
    pub(crate) data_bytes: u64,
    /// Size of the big image with preallocated metadata.
    pub(crate) huge_bytes: u64,
}

/// What the document's figures are made with.
pub(crate) const FULL: Scale = Scale { disk_bytes: 8 << 30, data_bytes: 2 << 30, huge_bytes: 4 << 40 };
/// For a quick look.
pub(crate) const QUICK: Scale = Scale { disk_bytes: 2 << 30, data_bytes: 256 << 20, huge_bytes: 256 << 30 };

/// The working directory with everything in it.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) dir: PathBuf,
    pub(crate) scale: Scale,
    reference: PathBuf,
}

/// Data comes in runs of this many bytes, each of one kind.
const RUN_BYTES: usize = 64 << 10;
/// One write of the fragmented image and of an overlay.
const WRITE_BYTES: u64 = 64 << 10;

impl Inputs {
    pub(crate) fn new(dir: &Path, scale: Scale, reference: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), scale, reference: reference.to_owned() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A word of a command with what its placeholders stand for.
    pub(crate) fn word(&self, word: &str) -> String {
        let Scale { data_bytes, huge_bytes, .. } = self.scale;
        word.replace("{o}", "output")
            .replace("{huge}", &huge_bytes.to_string())
            .replace("{data}", &data_bytes.to_string())
            .replace("{data_mib}", &(data_bytes >> 20).to_string())
    }

    /// Makes the input called `name` (and what it is made from) unless it is there.
    pub(crate) fn need(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        if path.exists() {
            return Ok(());
        }
        img_bench::say(&format!("  making {name}"));
        match name {
            "os.raw" => self.make_os_like(&path),
            "plain.qcow2" => self.convert(&["-O", "qcow2"], name),
            "zlib.qcow2" => self.convert(&["-c", "-O", "qcow2"], name),
            "zstd.qcow2" => self.convert(&["-c", "-O", "qcow2", "-o", "compression_type=zstd"], name),
            "plain.vmdk" => self.convert(&["-O", "vmdk"], name),
            "plain.vpc" => self.convert(&["-O", "vpc"], name),
            "plain.qed" => self.convert(&["-O", "qed"], name),
            "stream.vmdk" => self.convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], name),
            "fragmented.qcow2" => self.make_fragmented(name),
            "strided.qcow2" => self.make_strided(name),
            "overlay.qcow2" => self.make_overlay(name),
            "branch.qcow2" => self.make_branch(name),
            "snapshots.qcow2" => self.make_snapshots(name),
            "huge.qcow2" => self.make_huge(name),
            "huge-snapshot.qcow2" => {
                self.make_huge(name)?;
                self.reference(&["snapshot", "-c", "one", name])
            }
            _ => {
                let depth = name
                    .strip_prefix("chain")
                    .and_then(|rest| rest.strip_suffix(".qcow2"))
                    .and_then(|depth| depth.parse().ok())
                    .ok_or_else(|| io::Error::other(format!("no input is called {name}")))?;
                self.make_chain(name, depth)
            }
        }
    }

    fn reference(&self, arguments: &[&str]) -> io::Result<()> {
        let status = Command::new(&self.reference)
            .args(arguments)
            .current_dir(&self.dir)
            .stdout(Stdio::null())
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("qemu-img {arguments:?}: {status}")))
        }
    }

    fn convert(&self, options: &[&str], name: &str) -> io::Result<()> {
        self.need("os.raw")?;
        self.reference(&[&["convert", "-f", "raw"], options, &["os.raw", name]].concat())
    }

    /// Feeds `lines` to qemu-io on the image `name`.
    fn io(&self, name: &str, lines: impl Iterator<Item = String>) -> io::Result<()> {
        let mut child = Command::new("qemu-io")
            .args(["-t", "unsafe", "-f", "qcow2", name])
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let mut input = io::BufWriter::new(child.stdin.take().expect("was asked for"));
        for line in lines {
            writeln!(input, "{line}")?;
        }
        input.flush()?;
        drop(input);
        let status = child.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("qemu-io {name}: {status}"))) }
    }

    /// A disk as an installed system leaves it: data in files of several sizes with free space between,
    /// a quarter each of text, machine code, compressed files, and sparse tables.
    fn make_os_like(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.scale.disk_bytes)?;
        let mut random = Random(1);
        let mut run = vec![0; RUN_BYTES];
        let (mut at, mut written) = (0, 0);
        let stride = self.scale.disk_bytes / self.scale.data_bytes;
        while written < self.scale.data_bytes && at < self.scale.disk_bytes {
            // Files of 64 KiB to 4 MiB, followed by free space in proportion.
            let runs = 1 + random.below(64);
            for _ in 0..runs {
                if at + RUN_BYTES as u64 > self.scale.disk_bytes || written >= self.scale.data_bytes {
                    break;
                }
                fill(&mut run, &mut random);
                file.write_all_at(&run, at)?;
                at += RUN_BYTES as u64;
                written += RUN_BYTES as u64;
            }
            at += runs * (stride - 1) * RUN_BYTES as u64;
        }
        file.sync_all()
    }

    /// Every cluster written in shuffled order.
    fn make_fragmented(&self, name: &str) -> io::Result<()> {
        self.reference(&["create", "-f", "qcow2", name, &self.scale.disk_bytes.to_string()])?;
        let mut clusters: Vec<u64> = (0..self.scale.data_bytes / WRITE_BYTES).collect();
        let mut random = Random(2);
        for last in (1..clusters.len()).rev() {
            let other = usize::try_from(random.below(last as u64 + 1)).expect("an index");
            clusters.swap(last, other);
        }
        self.io(
            name,
            clusters.into_iter().map(|c| format!("write -q -P {} {} 64k", c % 251 + 1, c * WRITE_BYTES)),
        )
    }

    /// A base and overlays, each with some writes of its own.
    fn make_chain(&self, name: &str, depth: u32) -> io::Result<()> {
        self.need("plain.qcow2")?;
        let mut below = "plain.qcow2".to_owned();
        let mut random = Random(u64::from(depth));
        for layer in 1..depth {
            let this =
                if layer + 1 == depth { name.to_owned() } else { format!("chain{depth}-{layer}.qcow2") };
            self.reference(&["create", "-f", "qcow2", "-b", &below, "-F", "qcow2", &this])?;
            let clusters = self.scale.disk_bytes / WRITE_BYTES;
            let writes: Vec<String> = (0..32)
                .map(|_| format!("write -q -P {layer} {} 64k", random.below(clusters) * WRITE_BYTES))
                .collect();
            self.io(&this, writes.into_iter())?;
            below = this;
        }
        Ok(())
    }

    /// Over a copy of `plain.qcow2` that is made for each run, as committing changes it; a quarter of the data.
    fn make_overlay(&self, name: &str) -> io::Result<()> {
        self.need("plain.qcow2")?;
        let size = self.scale.disk_bytes.to_string();
        let backing = ["-u", "-b", "below.qcow2", "-F", "qcow2"];
        self.reference(&[&["create", "-f", "qcow2"], &backing[..], &[name, &size]].concat())?;
        fs::copy(self.path("plain.qcow2"), self.path("below.qcow2"))?;
        let writes = self.scale.data_bytes / 4 / WRITE_BYTES;
        self.write_at_random(name, 4, writes)
    }

    /// A layer over the middle of the chain of 32.
    fn make_branch(&self, name: &str) -> io::Result<()> {
        self.need("chain32.qcow2")?;
        self.reference(&["create", "-f", "qcow2", "-b", "chain32-16.qcow2", "-F", "qcow2", name])?;
        self.write_at_random(name, 5, 32)
    }

    fn write_at_random(&self, name: &str, seed: u64, writes: u64) -> io::Result<()> {
        let mut random = Random(seed);
        let clusters = self.scale.disk_bytes / WRITE_BYTES;
        let mut line = || format!("write -q -P {seed} {} 64k", random.below(clusters) * WRITE_BYTES);
        self.io(name, (0..writes).map(|_| line()))
    }

    /// What the row of allocating writes must leave.
    fn make_strided(&self, name: &str) -> io::Result<()> {
        self.reference(&["create", "-f", "qcow2", name, "1G"])?;
        self.reference(&["bench", "-w", "--pattern", "7", "-c", "8000", "-S", "65536", "-f", "qcow2", name])
    }

    /// 50 internal snapshots with some writes between them.
    fn make_snapshots(&self, name: &str) -> io::Result<()> {
        self.need("plain.qcow2")?;
        fs::copy(self.path("plain.qcow2"), self.path(name))?;
        let mut random = Random(3);
        let clusters = self.scale.disk_bytes / WRITE_BYTES;
        for snapshot in 0..50 {
            let writes: Vec<String> = (0..64)
                .map(|_| format!("write -q -P 7 {} 64k", random.below(clusters) * WRITE_BYTES))
                .collect();
            self.io(name, writes.into_iter())?;
            self.reference(&["snapshot", "-c", &format!("s{snapshot}"), name])?;
        }
        Ok(())
    }

    fn make_huge(&self, name: &str) -> io::Result<()> {
        let size = self.scale.huge_bytes.to_string();
        self.reference(&["create", "-f", "qcow2", "-o", "preallocation=metadata", name, &size])
    }
}

/// Fills a run with bytes of one kind.
fn fill(run: &mut [u8], random: &mut Random) {
    const WORDS: [&str; 16] = [
        "the ",
        "error ",
        "return ",
        "/usr/lib/",
        "static ",
        "0x00",
        "struct ",
        "}\n",
        "config ",
        "= ",
        "void ",
        "package ",
        "version ",
        "if (",
        "->",
        "systemd ",
    ];
    match random.below(4) {
        0 => {
            let mut at = 0;
            while at < run.len() {
                let word = WORDS[usize::try_from(random.below(16)).expect("an index")].as_bytes();
                let length = word.len().min(run.len() - at);
                run[at..at + length].copy_from_slice(&word[..length]);
                at += length;
            }
        }
        1 => {
            // Like code: few distinct high bytes, busy low ones.
            for word in run.chunks_exact_mut(4) {
                let bits = random.next();
                word.copy_from_slice(&[
                    bits.to_le_bytes()[0] & 0x3f,
                    bits.to_le_bytes()[1] & 0x0f,
                    0x48,
                    0x8b,
                ]);
            }
        }
        2 => {
            for word in run.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        _ => {
            run.fill(0);
            for row in run.chunks_exact_mut(512) {
                row[..8].copy_from_slice(&random.next().to_le_bytes());
            }
        }
    }
}

/// xorshift64*: the inputs are the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
