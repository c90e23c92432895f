//! The audit: copies of the footer, the sum of the header, the places of blocks, and space that nothing uses.
//!
//! What is known twice is repaired from the copy that is whole. Entries of the table are known once: one that
//! is wrong is named and left, as nothing says what belongs there.

use std::path::Path;

use zerocopy::IntoBytes as _;

use super::{
    footer::{Copies, Copy, DiskType, Footer, SizeRule},
    geometry::SECTOR_BYTES,
    header::{Header, checked_block},
    map::read_table,
    places::Places,
};
use crate::{
    Result,
    format::{CheckReport, CheckWatch, Finding, Repair},
    storage::{Flush, Preallocation, Storage},
};

/// Audits the image on `storage`; see [`Layer::check`](crate::format::Layer::check).
pub(super) fn check(
    storage: &dyn Storage,
    rule: SizeRule,
    repair: Repair,
    findings: &mut dyn FnMut(Finding),
    watch: &CheckWatch<'_>,
) -> Result<CheckReport> {
    let copies = Copies::read(storage)?;
    let footer = copies.choose(storage.path())?;
    let virtual_size_bytes = footer.virtual_size_bytes(storage.path(), rule)?;
    if footer.disk_type == DiskType::Fixed {
        return Ok(CheckReport {
            image_end_offset: footer.at_bytes + SECTOR_BYTES,
            ..CheckReport::default()
        });
    }
    let header = Header::read(storage, footer.raw.data_offset.get(), virtual_size_bytes)?;
    let places = Places::collect(storage, &header, footer.disk_type)?;
    let mut audit =
        Audit { storage, repair, copies, footer, header, places, findings, report: CheckReport::default() };
    audit.report.total_clusters = virtual_size_bytes.div_ceil(audit.header.block_bytes);
    audit.report.allocated_clusters = audit.places.block_count() as u64;
    audit.report.fragmented_clusters = audit.places.fragmented() as u64;
    audit.report.image_end_offset = audit.places.used_end();
    audit.copies_at_the_front()?;
    audit.entries(watch)?;
    audit.end_of_the_file()?;
    Ok(audit.report)
}

struct Audit<'a> {
    storage: &'a dyn Storage,
    repair: Repair,
    copies: Copies,
    footer: Footer,
    header: Header,
    places: Places,
    findings: &'a mut dyn FnMut(Finding),
    report: CheckReport,
}

impl Audit<'_> {
    fn path(&self) -> &Path {
        self.storage.path()
    }

    fn tell(&mut self, text: String) {
        (self.findings)(Finding { text, with_program_name: false });
    }

    /// Tells of a corruption that [`Repair::All`] mends by writing `bytes` at `at`.
    fn mend(&mut self, what: &str, bytes: &[u8], at: u64) -> Result<()> {
        if self.repair == Repair::All {
            self.tell(format!("Repairing {what}"));
            self.storage.write_at(bytes, at)?;
            self.storage.flush(Flush::Data)?;
            self.report.corruptions_fixed += 1;
        } else {
            self.tell(format!("ERROR {what}"));
            self.report.corruptions += 1;
        }
        Ok(())
    }

    /// The footer's copy and the header.
    fn copies_at_the_front(&mut self) -> Result<()> {
        if self.copies.front != Copy::Intact(self.footer.raw) {
            let footer = self.footer.raw;
            self.mend("the copy of the footer at the start of the file is damaged", footer.as_bytes(), 0)?;
        }
        if !self.header.is_intact {
            let (raw, at) = (self.header.raw.summed(), self.header.at_bytes);
            let what = format!(
                "header checksum {:#010x}, should be {:#010x}",
                self.header.raw.checksum.get(),
                raw.checksum.get()
            );
            self.mend(&what, raw.as_bytes(), at)?;
        }
        Ok(())
    }

    /// Blocks outside the file, and blocks that share their place.
    fn entries(&mut self, watch: &CheckWatch<'_>) -> Result<()> {
        let mut wrong = Vec::new();
        let (header, path, file_bytes) = (&self.header, self.storage.path(), self.copies.file_bytes);
        read_table(self.storage, header, 0, |block, entry| {
            if checked_block(header, path, file_bytes, block, entry).is_err() {
                wrong.push(format!("ERROR block {block} at sector {entry:#x} is not inside the file"));
            }
            watch(block.into(), header.table_entries.into())
        })?;
        watch(header.table_entries.into(), header.table_entries.into())?;
        for at in &self.places.broken_locators {
            wrong.push(format!("ERROR the parent locator at byte {at:#x} leads outside the file"));
        }
        for overlap in self.places.overlaps() {
            wrong.push(format!(
                "ERROR block {} at byte {:#x} overlaps {}",
                overlap.block, overlap.at_bytes, overlap.with
            ));
        }
        self.report.corruptions += wrong.len() as u64;
        wrong.into_iter().for_each(|text| self.tell(text));
        Ok(())
    }

    /// Space behind the last block, and the footer there. Neither does harm: the next open for writing puts the
    /// footer back.
    fn end_of_the_file(&mut self) -> Result<()> {
        let (used_end, footer_at) = (self.places.used_end(), self.places.next_free(&self.copies));
        let has_footer =
            self.copies.back == Copy::Intact(self.footer.raw) && self.copies.back_at == footer_at;
        let leaked_bytes = footer_at.saturating_sub(used_end);
        if has_footer && leaked_bytes == 0 {
            return Ok(());
        }
        let mut leaks = leaked_bytes.div_ceil(self.header.stored_block_bytes());
        if leaked_bytes > 0 {
            self.tell(format!("Leaked {leaked_bytes} bytes at {used_end:#x}, behind the last block"));
        }
        if !has_footer {
            self.tell(format!("{}: the footer at the end of the file is missing", self.path().display()));
            leaks += 1;
        }
        // While an entry is wrong nobody knows what stands behind the blocks that are right.
        if self.repair == Repair::Nothing || self.report.corruptions > 0 {
            self.report.leaks += leaks;
            return Ok(());
        }
        // The footer is durable in its new place before the old one goes.
        self.storage.write_at(self.footer.raw.as_bytes(), used_end)?;
        self.storage.flush(Flush::Data)?;
        self.storage.resize(used_end + SECTOR_BYTES, Preallocation::Off)?;
        self.storage.flush(Flush::Data)?;
        self.report.leaks_fixed += leaks;
        Ok(())
    }
}
