//! Opening: which kind of file it is, its descriptor, and its extents under the rule for their names.

use std::{collections::HashMap, path::Path, sync::Arc};

use super::{
    cowd,
    descriptor::{self, Access, Descriptor, ExtentKind, ExtentLine, NO_PARENT},
    header::{self, Header, MAX_CAPACITY_SECTORS, SECTOR_BYTES},
    layer::{Content, GuestExtent, Kind, VmdkLayer},
    sesparse,
    sparse::{Directory, EntryForm, Shape, Sparse},
    stream,
};
use crate::{
    Error, Result,
    format::{Backing, HostFile, OpenContext, OptionSet, Outline, Reference, ReferenceKind, look_alone},
    storage::Storage,
};

/// The `createType`s of a descriptor that stands alone.
const STANDALONE_TYPES: [&str; 6] =
    ["monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

/// The runtime option that says where extents may be.
const EXTENT_NAMES: &str = "extent-names";

/// Opens the image on `storage`.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Unsupported`], and whatever opening an extent's file returns.
pub(super) fn open(storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<VmdkLayer> {
    let names = ExtentNames::read(context.options)?;
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    match magic {
        header::MAGIC => open_hosted(storage, context, names),
        cowd::MAGIC => {
            let feature = "a vmfsSparse extent without its descriptor";
            Err(Error::unsupported(storage.path(), feature))
        }
        _ => {
            let (bytes, at) = described_text(&*storage)?;
            open_described(storage, &bytes, at, context, names)
        }
    }
}

/// What the image on `storage` says, with no file opened that it names.
///
/// # Errors
/// As [`open`].
pub(super) fn outline(storage: Arc<dyn Storage>) -> Result<Outline> {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    let (bytes, at) = if magic == header::MAGIC {
        let (_, header) = Header::read(&*storage)?;
        let text = embedded_text(&*storage, &header)?;
        if header.capacity_sectors != 0 {
            let layer = look_alone(|context| open_hosted(storage, context, ExtentNames::Folder))?;
            return Ok(Outline::of(Arc::new(layer)));
        }
        text
    } else {
        described_text(&*storage)?
    };
    let descriptor = Descriptor::parse(&bytes, storage.path(), at)?;
    check_standalone(&descriptor)?;
    let parent = backing(&descriptor)
        .map(|Backing { name, format }| Reference { kind: ReferenceKind::Backing { format }, name });
    let mut references = Vec::from_iter(parent);
    let mut virtual_size_bytes = 0;
    for line in descriptor::extents(&bytes, storage.path(), at)? {
        // checked: below 2^63
        virtual_size_bytes = end_of_extent(&*storage, at, virtual_size_bytes, line.sectors * SECTOR_BYTES)?;
        if line.kind != ExtentKind::Zero {
            let kind = ReferenceKind::Extent { has_tables: line.kind != ExtentKind::Flat };
            references.push(Reference { kind, name: line.file_name });
        }
    }
    Ok(Outline { virtual_size_bytes, references, layer: None })
}

/// The text of a descriptor that stands alone.
pub(super) fn described_text(storage: &dyn Storage) -> Result<(Vec<u8>, u64)> {
    let bytes = read_text(storage, 0, descriptor::MAX_BYTES)?;
    if !descriptor::is_descriptor(&bytes) {
        return Err(Error::WrongFormat { file: storage.path().to_owned(), format: "vmdk" });
    }
    Ok((bytes, 0))
}

/// The content id that the image on `storage` has now: what a child records as its parent's.
///
/// # Errors
/// [`Error::WrongFormat`] when there is no descriptor, [`Error::Corrupt`] when it is damaged.
pub(super) fn content_id(storage: &dyn Storage) -> Result<u32> {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    let (bytes, at) = if magic == header::MAGIC {
        let (_, header) = Header::read(storage)?;
        embedded_text(storage, &header)?
    } else {
        described_text(storage)?
    };
    Ok(Descriptor::parse(&bytes, storage.path(), at)?.cid)
}

/// A file that begins with the header of a hosted sparse extent: it describes itself.
fn open_hosted(
    storage: Arc<dyn Storage>,
    context: &OpenContext<'_>,
    names: ExtentNames,
) -> Result<VmdkLayer> {
    let (raw, header) = Header::read(&*storage)?;
    let (bytes, at) = embedded_text(&*storage, &header)?;
    if header.capacity_sectors == 0 {
        // A header that says nothing but where the descriptor is.
        return open_described(storage, &bytes, at, context, names);
    }
    let descriptor = Descriptor::parse(&bytes, storage.path(), at)?;
    let create_type = if header.compressed { "streamOptimized" } else { "monolithicSparse" };
    let writes = context.mode.writes() && storage.is_writable();
    if writes && header.version == 3 && !header.compressed {
        // Version 3 may track changed blocks elsewhere, which a write here would not.
        return Err(Error::unsupported(storage.path(), "writing a VMDK of version 3"));
    }
    let sparse = hosted(HostFile::IMAGE, Arc::clone(&storage), &raw, &header, writes)?;
    let size = sparse.capacity_bytes();
    let extent = GuestExtent::new(0..size, Kind::Sparse(Box::new(sparse)), String::new(), false);
    let content = Content { descriptor, at_bytes: at };
    Ok(VmdkLayer::new(context.mode, vec![storage], vec![extent], create_type.to_owned(), content))
}

/// A hosted sparse extent, wherever its directory is.
fn hosted(
    file: HostFile,
    storage: Arc<dyn Storage>,
    raw: &header::RawHeader,
    header: &Header,
    writes: bool,
) -> Result<Sparse> {
    let shape = |header: &Header, directory: Directory| Shape {
        capacity_bytes: header.capacity_bytes(),
        grain_bytes: header.grain_bytes(),
        table_entries: header.table_entries.into(),
        directory_entries: header.directory_entries,
        directory,
        redundant_at: header.redundant_at,
        form: EntryForm::Sectors { zeroed_grains: header.zeroed_grains },
        compressed: header.compressed,
        markers: header.markers,
        overhead_bytes: header.overhead_bytes,
    };
    let shape = match header.directory_at {
        Some(at) => {
            let file_bytes = storage.len_bytes()?;
            if header.overhead_bytes > file_bytes {
                return Err(Error::corrupt(
                    storage.path(),
                    "header.overHead",
                    64,
                    format_args!("at most {file_bytes} bytes, the length of the file"),
                    header.overhead_bytes,
                ));
            }
            shape(header, Directory::File(at))
        }
        None => match stream::footer(&*storage, raw, header)? {
            Some((footer, at)) => shape(&footer, Directory::File(at)),
            None => {
                let tables = stream::scan(&*storage, header)?;
                Shape { redundant_at: None, ..shape(header, Directory::Kept(tables)) }
            }
        },
    };
    // A stream that has its footer is complete.
    Sparse::new(file, storage, shape, writes && header.directory_at.is_some())
}

/// The text behind a header that has room for it.
pub(super) fn embedded_text(storage: &dyn Storage, header: &Header) -> Result<(Vec<u8>, u64)> {
    let Some(place) = &header.descriptor else {
        return Err(Error::corrupt(
            storage.path(),
            "header.descriptorOffset",
            28,
            "an embedded descriptor",
            "none: an extent of another image",
        ));
    };
    let len = (place.end - place.start).min(descriptor::MAX_BYTES);
    Ok((read_text(storage, place.start, len)?, place.start))
}

/// At most `len` bytes of text; no longer than the file.
fn read_text(storage: &dyn Storage, at: u64, len: u64) -> Result<Vec<u8>> {
    let len = storage.len_bytes()?.saturating_sub(at).min(len);
    let mut bytes = vec![0; usize::try_from(len).expect("at most 1 MiB")];
    storage.read_at(&mut bytes, at)?;
    Ok(bytes)
}

/// A descriptor whose extents are other files.
fn open_described(
    storage: Arc<dyn Storage>,
    bytes: &[u8],
    at: u64,
    context: &OpenContext<'_>,
    names: ExtentNames,
) -> Result<VmdkLayer> {
    let descriptor = Descriptor::parse(bytes, storage.path(), at)?;
    check_standalone(&descriptor)?;
    let create_type = descriptor.create_type.clone();
    let mut opener = ExtentFiles { files: vec![storage], known: HashMap::new(), context, names };
    let mut extents = Vec::new();
    let mut start_bytes = 0;
    for line in descriptor::extents(bytes, opener.files[0].path(), at)? {
        let (kind, len_bytes) = opener.open(&line)?;
        let end_bytes = end_of_extent(&*opener.files[0], at, start_bytes, len_bytes)?;
        let read_only = line.access == Access::ReadOnly;
        extents.push(GuestExtent::new(start_bytes..end_bytes, kind, line.type_name, read_only));
        start_bytes = end_bytes;
    }
    let content = Content { descriptor, at_bytes: at };
    let layer = VmdkLayer::new(context.mode, opener.files, extents, create_type, content);
    layer.check_shared_files()?;
    Ok(layer)
}

fn check_standalone(descriptor: &Descriptor) -> Result<()> {
    let create_type = &descriptor.create_type;
    if STANDALONE_TYPES.contains(&create_type.as_str()) {
        return Ok(());
    }
    Err(Error::Invalid(format!("Unsupported image type '{create_type}'")))
}

/// Where an extent ends on the disk that the descriptor at `at` describes.
fn end_of_extent(storage: &dyn Storage, at: u64, start_bytes: u64, len_bytes: u64) -> Result<u64> {
    start_bytes.checked_add(len_bytes).filter(|end| *end <= MAX_CAPACITY_SECTORS * SECTOR_BYTES).ok_or_else(
        || Error::corrupt(storage.path(), "descriptor", at, "extents of less than 2^63 bytes", "more"),
    )
}

/// The backing file that a descriptor records.
pub(super) fn backing(descriptor: &Descriptor) -> Option<Backing> {
    let name = descriptor.parent_hint.clone()?;
    Some(Backing { name, format: Some("vmdk".to_owned()) })
}

/// Whether a child with that descriptor stands on a parent at all.
pub(super) fn expects_parent(descriptor: &Descriptor) -> bool {
    descriptor.parent_hint.is_some() && descriptor.parent_cid != NO_PARENT
}

/// Where a descriptor's extents may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExtentNames {
    /// In the descriptor's folder, or in folders below it.
    Folder,
    /// Anywhere that the descriptor says.
    Any,
}

impl ExtentNames {
    fn read(options: &OptionSet) -> Result<Self> {
        if let Some((name, _)) = options.iter().find(|(name, _)| *name != EXTENT_NAMES) {
            return Err(Error::Invalid(format!("Block format 'vmdk' does not support the option '{name}'")));
        }
        match options.get(EXTENT_NAMES) {
            None | Some("folder") => Ok(Self::Folder),
            Some("any") => Ok(Self::Any),
            Some(other) => Err(Error::Invalid(format!("{EXTENT_NAMES} is 'folder' or 'any', not '{other}'"))),
        }
    }

    /// Refuses a name that leads out of the folder. An image has no say in which files of the host are read.
    fn check(self, descriptor: &Path, name: &str) -> Result<()> {
        let leaves = name.starts_with('/') || name.split('/').any(|part| part == "..");
        if self == Self::Any || !leaves {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: the extent '{name}' is not in the folder of its descriptor, and is not opened. Where the \
             descriptor is to be trusted, say {EXTENT_NAMES}=any (--image-opts \
             driver=vmdk,{EXTENT_NAMES}=any,file.filename=...)",
            crate::text::from_path(descriptor)
        )))
    }
}

/// The files of a descriptor, each opened once.
struct ExtentFiles<'a> {
    files: Vec<Arc<dyn Storage>>,
    known: HashMap<String, HostFile>,
    context: &'a OpenContext<'a>,
    names: ExtentNames,
}

impl ExtentFiles<'_> {
    fn open(&mut self, line: &ExtentLine) -> Result<(Kind, u64)> {
        let line_bytes = line.sectors * SECTOR_BYTES; // checked: below 2^63
        if line.kind == ExtentKind::Zero {
            return Ok((Kind::Zero, line_bytes));
        }
        let file = self.file(&line.file_name)?;
        let storage = Arc::clone(&self.files[file.0 as usize]);
        let writes = self.context.mode.writes() && line.access == Access::ReadWrite;
        let sparse = match line.kind {
            ExtentKind::Zero => unreachable!("answered above"),
            ExtentKind::Flat => {
                let at_bytes = line.offset_sectors * SECTOR_BYTES; // checked: below 2^63
                return Ok((Kind::Flat { file, at_bytes }, line_bytes));
            }
            ExtentKind::Sparse => {
                let (raw, header) = Header::read(&*storage)?;
                if header.capacity_sectors == 0 {
                    return Err(Error::corrupt(storage.path(), "header.capacity", 12, "some sectors", 0));
                }
                hosted(file, storage, &raw, &header, writes)?
            }
            ExtentKind::VmfsSparse => {
                Self::refuse_writing(writes, &*storage, "vmfsSparse")?;
                Sparse::new(file, Arc::clone(&storage), cowd::read(&*storage)?, false)?
            }
            ExtentKind::SeSparse => {
                Self::refuse_writing(writes, &*storage, "seSparse")?;
                Sparse::new(file, Arc::clone(&storage), sesparse::read(&*storage)?, false)?
            }
        };
        let len_bytes = sparse.capacity_bytes();
        Ok((Kind::Sparse(Box::new(sparse)), len_bytes))
    }

    fn refuse_writing(writes: bool, storage: &dyn Storage, kind: &str) -> Result<()> {
        if writes {
            return Err(Error::unsupported(storage.path(), format_args!("writing {kind} extents")));
        }
        Ok(())
    }

    /// The file called `name`, relative to the descriptor.
    fn file(&mut self, name: &str) -> Result<HostFile> {
        self.names.check(self.files[0].path(), name)?;
        if let Some(file) = self.known.get(name) {
            return Ok(*file);
        }
        let storage = (self.context.open_file)(&super::plain_name(name), self.context.mode)?;
        let same =
            |known: &Arc<dyn Storage>| known.identity().is_some_and(|id| storage.identity() == Some(id));
        if self.files.iter().any(same) {
            let file = self.files[0].path();
            let found = format!("'{name}', a file that it names already");
            return Err(Error::corrupt(file, "descriptor extent line", 0, "a file of its own", found));
        }
        let file = HostFile(u32::try_from(self.files.len()).expect("at most 8192 extents"));
        self.files.push(storage);
        self.known.insert(name.to_owned(), file);
        Ok(file)
    }
}
