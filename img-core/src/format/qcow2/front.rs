//! qcow2 to a pipe: metadata first, each L2 table in front of its clusters (see [`front_places`]).
//!
//! [`front_places`]: super::front_places

use std::path::Path;

use super::{
    create::Plan,
    create_layout::too_large,
    entry::{COPIED, L2Entry},
    front_places::{Head, LastSpan, Places},
    header::{Header, MAX_L1_BYTES},
};
use crate::{
    Error, Result,
    format::{Codec, CreateRequest, FrontRequest, FrontWriter, LookAhead, OptionSet, refuse_file_options},
    storage::Pipe,
};

/// See the module.
pub(super) struct Qcow2Front {
    header: Header,
    compress: bool,
    head: Head,
    places: Places,
    /// Where the L2 tables will stand; 0 for those without clusters.
    l1: Vec<u64>,
}

impl Qcow2Front {
    /// # Errors
    /// As creating one in a file; backing and data files are refused by name.
    pub(super) fn new(request: &FrontRequest<'_>) -> Result<Self> {
        refuse_file_options(request.options)?;
        let mut options: OptionSet = request.options.clone();
        options.take("preallocation");
        let plan = Plan::parse(
            Path::new("standard output"),
            &CreateRequest {
                virtual_size_bytes: request.virtual_size_bytes,
                backing: None,
                options: &options,
                open_file: &|name, _| Err(Error::Invalid(format!("'{name}' has no place in a pipe"))),
            },
        )?;
        let mut header = plan.header;
        let geometry = header.geometry;
        let l1_entries = geometry.l1_entries_for(request.virtual_size_bytes);
        if l1_entries > MAX_L1_BYTES / 8 || i64::try_from(request.virtual_size_bytes).is_err() {
            return Err(too_large());
        }
        let head = Head::new(geometry, geometry.clusters_for(request.virtual_size_bytes), l1_entries)?;
        header.refcount_table_offset = geometry.cluster_bytes();
        header.refcount_table_clusters = u32::try_from(head.table_clusters).expect("at most 8 MiB of table");
        header.l1_entries = u32::try_from(l1_entries).expect("at most 2^22");
        if l1_entries > 0 {
            header.l1_offset = (1 + head.table_clusters) << geometry.cluster_bits;
        }
        Ok(Self {
            compress: request.compress,
            places: Places::behind(&head, geometry),
            l1: vec![0; usize::try_from(l1_entries).expect("at most 2^22")],
            head,
            header,
        })
    }

    fn take(places: &mut Places, stored_bytes: u64, unit_bytes: u64, pipe: Option<&mut Pipe>) -> Result<u64> {
        if stored_bytes == unit_bytes {
            return places.cluster(pipe);
        }
        places.compressed(u32::try_from(stored_bytes).expect("less than a cluster"), pipe)
    }

    fn l1_index(&self, guest: u64) -> usize {
        usize::try_from(self.header.geometry.l1_index(guest)).expect("at most 2^22")
    }

    fn refcount_table(&self, last: LastSpan) -> Vec<u8> {
        let geometry = self.header.geometry;
        let block = |span: u64| {
            if span < self.head.blocks {
                (self.head.blocks_at + span) << geometry.cluster_bits
            } else if span + 1 == last.spans {
                last.block_at
            } else {
                Places::block_of(geometry, span)
            }
        };
        (0..last.spans).flat_map(|span| block(span).to_be_bytes()).collect()
    }
}

impl FrontWriter for Qcow2Front {
    fn unit_bytes(&self) -> u64 {
        self.header.geometry.cluster_bytes()
    }

    fn codec(&self) -> Option<Codec> {
        self.compress.then_some(self.header.compression)
    }

    fn look_ahead(&self) -> LookAhead {
        LookAhead::Tables(self.header.geometry.l2_span_bytes())
    }

    fn survey(&mut self, guest: u64, stored_bytes: u32) -> Result<()> {
        if stored_bytes == 0 {
            return Ok(());
        }
        let index = self.l1_index(guest);
        if self.l1[index] == 0 {
            self.l1[index] = self.places.cluster(None)?;
        }
        let unit_bytes = self.unit_bytes();
        Self::take(&mut self.places, stored_bytes.into(), unit_bytes, None).map(drop)
    }

    fn head(&mut self, pipe: &mut Pipe) -> Result<()> {
        let geometry = self.header.geometry;
        let last = self.places.end(None)?;
        self.places = Places::behind(&self.head, geometry);
        pipe.put(&self.header.encode()?)?;
        pipe.pad_to(self.header.refcount_table_offset)?;
        pipe.put(&self.refcount_table(last))?;
        pipe.pad_to((1 + self.head.table_clusters) << geometry.cluster_bits)?;
        for tables in self.l1.chunks(4096) {
            let entry = |at: &u64| if *at == 0 { 0 } else { *at | COPIED };
            let bytes: Vec<u8> = tables.iter().flat_map(|at| entry(at).to_be_bytes()).collect();
            pipe.put(&bytes)?;
        }
        pipe.pad_to(self.head.blocks_at << geometry.cluster_bits)?;
        if self.head.blocks > 0 {
            // The spans that the head fills: each cluster is in use once.
            let mut counts = vec![0; usize::try_from(geometry.cluster_bytes()).expect("at most 2 MiB")];
            for index in 0..usize::try_from(geometry.refcounts_per_block()).expect("at most 2^24 counts") {
                super::geometry::refcount_set(&mut counts, geometry.refcount_order, index, 1);
            }
            for _ in 0..self.head.blocks {
                pipe.put(&counts)?;
            }
        }
        pipe.pad_to(self.head.clusters << geometry.cluster_bits)
    }

    fn table(&mut self, units: &[(u64, u32)], pipe: &mut Pipe) -> Result<()> {
        let geometry = self.header.geometry;
        let units = units.iter().filter(|(_, stored_bytes)| *stored_bytes > 0);
        let Some(&(first, _)) = units.clone().next() else { return Ok(()) };
        let at = self.places.cluster(Some(pipe))?;
        if at != self.l1[self.l1_index(first)] {
            return Err(changed(first));
        }
        let mut table = vec![0; usize::try_from(geometry.cluster_bytes()).expect("at most 2 MiB")];
        let mut places = self.places.clone();
        for &(guest, stored_bytes) in units {
            let stored = u64::from(stored_bytes);
            let at = Self::take(&mut places, stored, geometry.cluster_bytes(), None)?;
            let entry = if stored == geometry.cluster_bytes() {
                L2Entry::standard(at, true, geometry)
            } else {
                L2Entry::for_compressed(at, stored_bytes, geometry)
            };
            let index = usize::try_from(geometry.l2_index(guest)).expect("at most 2^18");
            entry.write(&mut table, index, geometry);
        }
        pipe.put(&table)
    }

    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()> {
        if self.l1[self.l1_index(guest)] == 0 {
            return Err(changed(guest));
        }
        let unit_bytes = self.unit_bytes();
        Self::take(&mut self.places, stored.len() as u64, unit_bytes, Some(pipe))?;
        pipe.put(stored)
    }

    fn finish(&mut self, pipe: &mut Pipe) -> Result<()> {
        self.places.end(Some(pipe))?;
        pipe.pad_to(pipe.written_bytes().next_multiple_of(self.unit_bytes()))
    }
}

fn changed(guest: u64) -> Error {
    Error::Invalid(format!("the source changed at byte {guest} while it was read"))
}
