//! The target: judged, made and opened.

use std::sync::Arc;

use img_core::{
    format::{Driver, OpenMode, OptionDescription, OptionSet},
    image::{CacheMode, Image},
    job::Filling,
    storage::Watcher,
};

use super::Job;
use crate::{
    args::Opening,
    command::create::{self, Make},
    created::Created,
    error::Failure,
    names, option_list,
};

/// An image that is about to be made.
pub(super) struct PlannedTarget {
    driver: &'static dyn Driver,
    known: Vec<OptionDescription>,
    options: OptionSet,
}

impl Job<'_> {
    pub(super) fn target_cache(&self) -> Result<CacheMode, Failure> {
        match self.args.output_cache.as_deref() {
            None => Ok(CacheMode::Unsafe),
            Some(text) => CacheMode::from_name(text)
                .ok_or_else(|| Failure::new(format!("Invalid cache option: {text}"))),
        }
    }

    /// What the target is to be, as far as that can be judged before it is made.
    pub(super) fn plan_target(
        &self,
        total_bytes: u64,
        source_count: usize,
    ) -> Result<PlannedTarget, Failure> {
        let driver = create::driver(self.args.output_format.as_deref().unwrap_or("raw"))?;
        names::check_protocol(self.target).map_err(Failure::new)?;
        let known = option_list::descriptions(driver, true, self.context);
        let mut options = match &self.list {
            Some(list) => option_list::parse(list, &known).map_err(Failure::new)?,
            None => OptionSet::new(),
        };
        // The target is as big as the sources, whatever the options say.
        options.set("size", total_bytes.to_string());
        let (backing, format) = (self.args.backing.as_deref(), self.args.backing_format.as_deref());
        create::record_backing(driver, backing, format, &mut options, self.context)?;
        let has_backing = options.get("backing_file").is_some();
        if has_backing && source_count > 1 {
            return Err(Failure::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        if has_backing && options.get("backing_fmt").is_none() {
            return Err(Failure::new("Use of backing file requires explicit backing format"));
        }
        if self.args.compress {
            self.check_compression(driver.can_compress(), &options)?;
        }
        Ok(PlannedTarget { driver, known, options })
    }

    /// Makes the target, and tells whether it has a backing file.
    pub(super) fn create_target(
        &self,
        planned: PlannedTarget,
        created: &mut Created,
    ) -> Result<bool, Failure> {
        let PlannedTarget { driver, known, options } = planned;
        let has_backing = options.get("backing_file").is_some();
        created.expect(names::path(self.target));
        if let Some(data_file) = options.get("data_file") {
            created.expect(names::path(data_file));
        }
        let watcher: Arc<dyn Watcher> = Arc::new(Filling::new(self.reporter.stops(), 0));
        let make = Make { driver, file: self.target, options, known: &known, watcher: Some(&watcher) };
        let made = create::make_for("converting", make, self.context)?;
        created.add(made);
        Ok(has_backing)
    }

    fn check_compression(&self, can_compress: bool, options: &OptionSet) -> Result<(), Failure> {
        if !can_compress {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        if options.get("encryption").is_some_and(|on| on != "off") || options.get("encrypt.format").is_some()
        {
            return Err(Failure::new("Compression and encryption not supported at the same time"));
        }
        if options.get("preallocation").is_some_and(|mode| mode != "off") {
            return Err(Failure::new("Compression and preallocation not supported at the same time"));
        }
        Ok(())
    }

    pub(super) fn open_target(&self, cache: CacheMode) -> Result<Image, Failure> {
        let format = self.args.output_format.as_deref().or((!self.args.target_image_opts).then_some("raw"));
        Opening {
            image_opts: self.args.target_image_opts,
            cache,
            discards: self.sparse_bytes() > 0,
            ..Opening::named(self.target, format, OpenMode::Write)
        }
        .open(self.context)
    }
}
