//! New images: the options, the reference's checks in its words, and the bytes.
//!
//! [`Plan`] is what is to be made; [`Layout`] says where everything stands, and [`write`] puts it down by
//! phase:
//! 1. the file gets its length; refcount blocks, refcount table, L2 tables and L1 table, in large writes;
//! 2. flush;
//! 3. the header, behind which everything it names is durable: a file with a header is a whole image;
//! 4. flush.

use std::{path::Path, sync::Arc};

use super::{
    create_layout::{Layout, Run, too_large},
    create_write::{Batch, write_l2, write_refcounts},
    entry::COPIED,
    feature::{autoclear, compatible, incompatible},
    geometry::Geometry,
    header::{CLUSTER_BITS, EXTENDED_L2_MIN_CLUSTER_BITS, Header, MAX_L1_BYTES},
};
use crate::{
    Error, Result,
    format::{Codec, CreateRequest, OpenMode, OptionSet},
    storage::{Flush, Preallocation, Storage},
};

/// How much of a new image is set aside ("preallocation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Metadata,
    Falloc,
    Full,
}

/// The options of a new image, checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) header: Header,
    mode: Mode,
}

/// The reference allocates preallocated clusters by slices of an L2 table of at most this size.
const SLICE_BYTES: u64 = 4096;

/// Makes a new image on `storage`, which is empty.
///
/// # Errors
/// [`Error::Invalid`] in the reference's words for options that are refused; [`Error::Unsupported`] for
/// encryption.
pub(super) fn create(storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
    let mut plan = Plan::parse(storage.path(), request)?;
    let size = request.virtual_size_bytes;
    let geometry = plan.header.geometry;
    let l1_entries = geometry.l1_entries_for(size);
    if l1_entries > MAX_L1_BYTES / 8 || i64::try_from(size).is_err() {
        return Err(too_large());
    }
    // Fails where the names do not fit, before anything is made.
    plan.header.encode()?;
    let data_file = match &plan.header.data_file {
        Some(name) => Some((request.open_file)(name, OpenMode::Write)?),
        None => None,
    };

    let mut layout = Layout::new(geometry);
    let mut tables = Tables::default();
    if l1_entries > 0 {
        let start = layout.allocate(geometry.clusters_for(l1_entries * 8))?;
        plan.header.l1_entries = u32::try_from(l1_entries).expect("at most 2^22");
        plan.header.l1_offset = start << geometry.cluster_bits;
        tables.file_end_bytes = plan.header.l1_offset + l1_entries * 8;
    }
    match plan.mode {
        Mode::Off => {}
        Mode::Falloc | Mode::Full if data_file.is_none() => {
            tables.place_at_once(&mut layout, geometry, size)?;
        }
        _ => tables.place_in_turn(&mut layout, geometry, size)?,
    }
    let table = layout.table();
    plan.header.refcount_table_offset = table.start << geometry.cluster_bits;
    plan.header.refcount_table_clusters = u32::try_from(table.clusters).expect("at most 8 MiB of table");

    if let Some(data) = &data_file {
        let preallocation = match plan.mode {
            Mode::Off | Mode::Metadata => Preallocation::Off,
            Mode::Falloc => Preallocation::Falloc,
            Mode::Full => Preallocation::Full,
        };
        data.resize(size, preallocation)?;
    }
    write(&**storage, &plan, &layout, &tables)?;
    match data_file {
        Some(data) => data.flush(Flush::Data),
        None => Ok(()),
    }
}

impl Plan {
    /// Reads the options and makes the reference's checks, in its order.
    pub(super) fn parse(file: &Path, request: &CreateRequest<'_>) -> Result<Self> {
        let options = request.options;
        refuse_encryption(file, options)?;
        let version = choice(options, "compat", "version", &[("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)])?;
        let modes = [
            ("off", Mode::Off),
            ("metadata", Mode::Metadata),
            ("falloc", Mode::Falloc),
            ("full", Mode::Full),
        ];
        let mode = choice(options, "preallocation", "preallocation", &modes)?.unwrap_or(Mode::Off);
        let codecs = [("zlib", Codec::Deflate), ("zstd", Codec::Zstd)];
        let compression = choice(options, "compression_type", "compression-type", &codecs)?;
        let compression = compression.unwrap_or(Codec::Deflate);
        let data_file = options.get("data_file").map(str::to_owned);
        let data_file_raw = options.switch("data_file_raw")?.unwrap_or(false);
        let extended_l2 = options.switch("extended_l2")?.unwrap_or(false);
        let lazy_refcounts = options.switch("lazy_refcounts")?.unwrap_or(false);
        let cluster_bytes = options.size("cluster_size")?.unwrap_or(65536);
        let refcount_bits = options.number("refcount_bits")?.unwrap_or(16);
        let version = version.unwrap_or(3);
        let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
        let newer = "compatibility level 1.1 and above (use version=v3 or greater)";

        let cluster_bits = cluster_bytes.trailing_zeros();
        if !cluster_bytes.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if extended_l2 && cluster_bits < EXTENDED_L2_MIN_CLUSTER_BITS {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        if extended_l2 && version < 3 {
            return invalid(&format!("Extended L2 entries are only supported with {newer}"));
        }
        if request.backing.is_some() && mode != Mode::Off && !extended_l2 {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        if lazy_refcounts && version < 3 {
            return invalid(&format!("Lazy refcounts only supported with {newer}"));
        }
        if refcount_bits > 64 || !refcount_bits.is_power_of_two() {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if version < 3 && refcount_bits != 16 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if data_file_raw && data_file.is_none() {
            return invalid("data-file-raw requires data-file");
        }
        if data_file_raw && request.backing.is_some() {
            return invalid("Backing file and data-file-raw cannot be used at the same time");
        }
        if data_file.is_some() && version < 3 {
            return invalid(&format!("External data files are only supported with {newer}"));
        }
        if compression != Codec::Deflate && version < 3 {
            return invalid(&format!("Non-zlib compression type is only supported with {newer}"));
        }

        let refcount_order = refcount_bits.trailing_zeros();
        let external_data = data_file.is_some();
        let geometry = Geometry { version, cluster_bits, refcount_order, extended_l2, external_data };
        let mut header = Header::new(geometry, request.virtual_size_bytes);
        if lazy_refcounts {
            header.compatible |= compatible::LAZY_REFCOUNTS;
        }
        if compression != Codec::Deflate {
            header.incompatible |= incompatible::COMPRESSION;
        }
        if data_file_raw {
            header.autoclear |= autoclear::RAW_DATA;
        }
        header.compression = compression;
        header.data_file = data_file;
        header.backing.clone_from(&request.backing);
        // A raw view of the data file means that every cluster is mapped from the start.
        let mode = if data_file_raw && mode == Mode::Off { Mode::Metadata } else { mode };
        Ok(Self { header, mode })
    }
}

/// Options that ask for encryption are refused by their names.
fn refuse_encryption(file: &Path, options: &OptionSet) -> Result<()> {
    let name = options.iter().map(|(name, _)| name).find(|name| name.starts_with("encrypt."));
    let name = match name {
        None if options.switch("encryption")? == Some(true) => Some("encryption"),
        name => name,
    };
    match name {
        Some(name) => Err(Error::unsupported(file, format_args!("the option '{name}'"))),
        None => Ok(()),
    }
}

/// The value of an option that takes one of some words; `called` is its name in the reference's messages.
fn choice<T: Copy>(options: &OptionSet, name: &str, called: &str, words: &[(&str, T)]) -> Result<Option<T>> {
    let Some(text) = options.get(name) else { return Ok(None) };
    match words.iter().find(|(word, _)| *word == text) {
        Some(&(_, value)) => Ok(Some(value)),
        None => Err(Error::Invalid(format!("Parameter '{called}' does not accept value '{text}'"))),
    }
}

/// The L2 tables of preallocated metadata.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Cluster numbers, by index in L1.
    pub(super) l2: Vec<u64>,
    /// Where guest clusters stand: runs of host clusters, in guest order, without gaps on the guest side.
    pub(super) data: Vec<Run>,
    /// The length that the image file has at least.
    file_end_bytes: u64,
}

impl Tables {
    /// "metadata", and any preallocation where data has a file of its own: an L2 table, the clusters behind
    /// it, the next table, as a writer from first byte to last would allocate them.
    fn place_in_turn(&mut self, layout: &mut Layout, geometry: Geometry, size_bytes: u64) -> Result<()> {
        let guest_clusters = geometry.clusters_for(size_bytes);
        let slice = SLICE_BYTES.min(geometry.cluster_bytes()) / geometry.l2_entry_bytes();
        let mut guest = 0;
        while guest < guest_clusters {
            if guest % geometry.l2_entries() == 0 {
                self.l2.push(layout.allocate(1)?);
            }
            let clusters = slice.min(guest_clusters - guest);
            let start = if geometry.external_data { guest } else { layout.allocate(clusters)? };
            self.push(Run { start, clusters });
            guest += clusters;
        }
        if let Some(last) = self.data.last()
            && !geometry.external_data
        {
            // The file ends with the subcluster that the disk ends in.
            let data_end = (last.start + last.clusters) << geometry.cluster_bits;
            let guest_end = size_bytes.next_multiple_of(geometry.subcluster_bytes());
            let data_end = data_end - ((guest_clusters << geometry.cluster_bits) - guest_end);
            self.file_end_bytes = self.file_end_bytes.max(data_end);
        }
        Ok(())
    }

    /// "falloc" and "full": all data in one piece behind refcount structures made for it, L2 tables where
    /// there is room.
    fn place_at_once(&mut self, layout: &mut Layout, geometry: Geometry, size_bytes: u64) -> Result<()> {
        let clusters = geometry.clusters_for(size_bytes);
        let tables = clusters.div_ceil(geometry.l2_entries());
        // Two more tables than needed, as the reference counts them.
        let start = layout.refcount_area(layout.end(), clusters + tables + 2, true)?;
        let taken = layout.allocate_at(start, clusters)?;
        assert_eq!(taken, clusters, "nothing stands behind the new refcount structures");
        if clusters > 0 {
            self.push(Run { start, clusters });
        }
        for _ in 0..tables {
            self.l2.push(layout.allocate(1)?);
        }
        self.file_end_bytes = (start + clusters) << geometry.cluster_bits;
        Ok(())
    }

    fn push(&mut self, run: Run) {
        match self.data.last_mut() {
            Some(last) if last.start + last.clusters == run.start => last.clusters += run.clusters,
            _ => self.data.push(run),
        }
    }
}

/// Puts the image down; the steps are those above.
fn write(storage: &dyn Storage, plan: &Plan, layout: &Layout, tables: &Tables) -> Result<()> {
    let geometry = plan.header.geometry;
    let scattered = plan.mode == Mode::Metadata && !geometry.external_data;
    let mut out = Batch::new(storage, scattered);
    // 1.
    if storage.len_bytes()? < tables.file_end_bytes {
        storage.resize(tables.file_end_bytes, Preallocation::Off)?;
    }
    if let (Some(data), Mode::Falloc | Mode::Full, false) =
        (tables.data.first(), plan.mode, geometry.external_data)
    {
        let range =
            data.start << geometry.cluster_bits..(data.start + data.clusters) << geometry.cluster_bits;
        let how = if plan.mode == Mode::Full { Preallocation::Full } else { Preallocation::Falloc };
        storage.preallocate(range, how)?;
    }
    write_refcounts(&mut out, layout, geometry)?;
    write_l2(&mut out, tables, geometry)?;
    if plan.header.l1_entries > 0 {
        let mut l1 = vec![0; plan.header.l1_entries as usize * 8];
        for (entry, &cluster) in l1.chunks_exact_mut(8).zip(&tables.l2) {
            entry.copy_from_slice(&(cluster << geometry.cluster_bits | COPIED).to_be_bytes());
        }
        out.put(plan.header.l1_offset, &l1)?;
    }
    out.finish()?;
    // 2.
    storage.flush(Flush::Data)?;
    // 3.
    plan.header.write(storage)?;
    // 4.
    storage.flush(Flush::Data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{
        Backing,
        qcow2::oracle::{self, assert_same_bytes, file, qemu_img, try_qemu_img},
    };

    /// Makes an image with our code from `-o` options, `backing_file` and `backing_fmt` among them.
    fn create_ours(directory: &Path, name: &str, size: u64, options: &str) -> Result<()> {
        let mut set = OptionSet::new();
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').expect("name=value");
            set.set(name, value);
        }
        let backing = set.take("backing_file").map(|name| Backing { name, format: set.take("backing_fmt") });
        let open_file = |name: &str, _| Ok(file(&directory.join(name)));
        let request =
            CreateRequest { virtual_size_bytes: size, backing, options: &set, open_file: &open_file };
        create(&file(&directory.join(name)), &request)
    }

    /// Ours and the reference's image are the same bytes, and data files have the same length.
    fn same(size: u64, options: &str) {
        let (ours, theirs) = (oracle::directory(), oracle::directory());
        let what = format!("size {size}, {options:?}");
        create_ours(ours.path(), "x", size, options).unwrap_or_else(|error| panic!("{what}: {error}"));
        let size = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-u"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        qemu_img(theirs.path(), &[&arguments[..], &["x", &size]].concat());
        let open = |directory: &tempfile::TempDir, name| file(&directory.path().join(name));
        assert_same_bytes(&*open(&ours, "x"), &*open(&theirs, "x"), &what);
        if options.contains("data_file") {
            assert_same_bytes(&*open(&ours, "data"), &*open(&theirs, "data"), &what);
        }
    }

    #[test]
    fn plain_images_of_every_size() {
        for size in [0, 512, 1 << 20, (1 << 30) + 512, 600 << 20, 3 << 40, 64 << 40] {
            same(size, "");
        }
    }

    #[test]
    fn every_cluster_size() {
        for bits in 9..=21 {
            same(100 << 20, &format!("cluster_size={}", 1 << bits));
            same(16 << 30, &format!("cluster_size={}", 1 << bits));
        }
        same(128 << 30, "cluster_size=512");
    }

    #[test]
    fn every_refcount_width() {
        for bits in [1, 2, 4, 8, 16, 32, 64] {
            same(1 << 30, &format!("refcount_bits={bits}"));
            same(4 << 30, &format!("refcount_bits={bits},cluster_size=512"));
        }
    }

    #[test]
    fn versions_and_features() {
        for options in [
            "compat=0.10",
            "compat=v2,cluster_size=4096",
            "compat=1.1,lazy_refcounts=on",
            "compat=v3,extended_l2=on",
            "extended_l2=on,cluster_size=16k",
            "compression_type=zstd",
            "backing_file=b.qcow2,backing_fmt=qcow2",
            "compat=0.10,backing_file=some/long/name.raw,backing_fmt=raw",
            "data_file=data",
            "data_file=data,data_file_raw=on",
            "data_file=data,data_file_raw=on,extended_l2=on",
            "data_file=data,preallocation=metadata",
            "data_file=data,preallocation=falloc",
        ] {
            same(10 << 20, options);
            same(5 << 30, options);
        }
    }

    #[test]
    fn preallocated_metadata() {
        for options in [
            "",
            "cluster_size=4096",
            "extended_l2=on",
            "extended_l2=on,cluster_size=16k,backing_file=b,backing_fmt=raw",
            "compat=0.10",
            "cluster_size=2M",
            "cluster_size=2M,refcount_bits=64",
            "lazy_refcounts=on",
            "refcount_bits=1,cluster_size=1k",
        ] {
            for size in [0, 512, (1 << 20) + 512, 40 << 20] {
                let options =
                    format!("{options}{}preallocation=metadata", if options.is_empty() { "" } else { "," });
                same(size, &options);
            }
        }
        same(600 << 20, "preallocation=metadata");
        same(200 << 20, "preallocation=metadata,cluster_size=16k,extended_l2=on");
        same(3 << 30, "preallocation=metadata");
        same(2 << 30, "preallocation=metadata,refcount_bits=64,cluster_size=32k,extended_l2=on");
        same(2 << 30, "preallocation=metadata,refcount_bits=64,cluster_size=16k");
        same(8 << 20, "preallocation=metadata,cluster_size=512");
        same(8 << 20, "preallocation=metadata,cluster_size=512,refcount_bits=64");
        same(1 << 40, "preallocation=metadata,cluster_size=2M,refcount_bits=64");
    }

    #[test]
    fn preallocated_data() {
        for mode in ["falloc", "full"] {
            for options in ["", ",cluster_size=512", ",extended_l2=on", ",cluster_size=2M,refcount_bits=64"] {
                for size in [0, 512, (1 << 20) + 512, 40 << 20] {
                    same(size, &format!("preallocation={mode}{options}"));
                }
            }
        }
        same(100 << 20, "preallocation=falloc,refcount_bits=64,cluster_size=4k");
    }

    /// What is refused is refused in the same words.
    #[test]
    fn refusals() {
        for options in [
            "cluster_size=1000",
            "cluster_size=256",
            "cluster_size=4M",
            "refcount_bits=3",
            "refcount_bits=0",
            "refcount_bits=128",
            "compat=foo",
            "compat=0.10,refcount_bits=8",
            "compat=0.10,lazy_refcounts=on",
            "compat=0.10,extended_l2=on",
            "compat=0.10,compression_type=zstd",
            "compat=0.10,data_file=data",
            "extended_l2=on,cluster_size=8k",
            "compression_type=lzma",
            "preallocation=some",
            "data_file_raw=on",
            "data_file=data,data_file_raw=on,backing_file=b,backing_fmt=raw",
            "preallocation=metadata,backing_file=b,backing_fmt=raw",
            "cluster_size=512,size=129G",
            "size=4096P",
        ] {
            let directory = oracle::directory();
            let (options_without, size) =
                match options.rsplit_once("size=").filter(|(rest, _)| !rest.ends_with('_')) {
                    Some((rest, size)) => (rest.trim_end_matches(','), size),
                    None => (options, "1M"),
                };
            let bytes = crate::format::options::parse_size(size).unwrap();
            let error = create_ours(directory.path(), "x", bytes, options_without).expect_err(options);
            let arguments = ["create", "-q", "-u", "-f", "qcow2", "-o", options, "x"];
            let theirs = if options == options_without {
                try_qemu_img(directory.path(), &[&arguments[..], &[size]].concat())
            } else {
                try_qemu_img(directory.path(), &arguments)
            };
            assert_eq!(format!("qemu-img: x: {error}\n"), theirs.2, "{options}");
        }
    }

    #[test]
    fn encryption_is_refused_by_name() {
        let directory = oracle::directory();
        for options in ["encryption=on", "encrypt.format=luks", "encrypt.iter-time=10"] {
            let error = create_ours(directory.path(), "x", 1 << 20, options).expect_err(options);
            assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
            assert!(error.to_string().contains(options.split('=').next().unwrap()), "{error}");
        }
        create_ours(directory.path(), "x", 1 << 20, "encryption=off").unwrap();
    }
}
