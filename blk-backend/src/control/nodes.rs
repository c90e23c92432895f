//! Disks under names.
//!
//! Lock order: `changing` before `list`. No request of a guest or client takes either.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use img_core::image::CacheMode;

use super::command::CommandError;
use crate::disk::Disk;

/// Whether a guest is held for a disk's sake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// It is not.
    #[default]
    Ok,
    /// Because of a failure.
    Failed,
    /// Because the host has no space.
    NoSpace,
}

impl IoStatus {
    /// QMP's word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// A disk under a name.
#[derive(Clone, Debug)]
pub struct Node {
    /// The device: stays with the disk whatever is put on top of it.
    pub name: String,
    /// What it names.
    pub disk: Arc<Disk>,
    /// The mode in which the disk was opened.
    pub cache: CacheMode,
    /// Whether the guest's requests end well, where the service says so.
    pub io_status: Option<IoStatus>,
    /// Names of the layers, from the top down.
    layer_names: Vec<String>,
}

/// The longest name of a node, as in the reference.
const MAX_NAME_BYTES: usize = 31;

/// Whether it is a name that users and clients may choose: a letter, then letters, digits, dashes, dots and underscores.
/// Those that are made up here begin otherwise.
pub(super) fn is_well_formed(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter))
}

impl Node {
    /// The node name of the layer at `depth`, 0 being the top.
    #[must_use]
    pub fn layer_name(&self, depth: usize) -> String {
        self.layer_names.get(depth).cloned().unwrap_or_else(|| self.made_up(depth))
    }

    /// A name for the layer that has so many others below or above it, as they come.
    fn made_up(&self, others: usize) -> String {
        format!("#{}-{others}", self.name)
    }
}

/// The disks that a service has.
#[derive(Debug, Default)]
pub struct Nodes {
    list: Mutex<Vec<Node>>,
    /// One command at a time gives names to layers and to their snapshots.
    changing: Mutex<()>,
}

impl Nodes {
    /// Puts a disk under a name. `cache` is the mode it was opened in.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the name is taken, or cannot be one.
    pub fn add(&self, name: &str, disk: &Arc<Disk>, cache: CacheMode) -> img_core::Result<()> {
        check_name(name).map_err(img_core::Error::Invalid)?;
        let mut list = self.list();
        if list.iter().any(|node| node.name == name) {
            return Err(img_core::Error::Invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        let (name, disk) = (name.to_owned(), Arc::clone(disk));
        let mut node = Node { name, disk, cache, io_status: None, layer_names: Vec::new() };
        let below = (1..node.disk.image().layers().len()).map(|depth| node.made_up(depth));
        node.layer_names = std::iter::once(node.name.clone()).chain(below).collect();
        list.push(node);
        Ok(())
    }

    /// Says how requests of a disk end.
    pub fn set_io_status(&self, name: &str, status: IoStatus) {
        if let Some(node) = self.list().iter_mut().find(|node| node.name == name) {
            node.io_status = Some(status);
        }
    }

    /// All of them, in the order of their coming.
    #[must_use]
    pub fn all(&self) -> Vec<Node> {
        self.list().clone()
    }

    /// A disk by its device, or where there is no such device by the node name of its top layer.
    ///
    /// # Errors
    /// When there is none, or the layer of that name is below others.
    pub fn find(&self, device: &str, node_name: &str) -> Result<Node, CommandError> {
        let nodes = self.list();
        let by_device = nodes.iter().find(|node| node.name == device);
        let found = by_device.or_else(|| nodes.iter().find(|node| node.layer_names[0] == node_name));
        if let Some(node) = found {
            return Ok(node.clone());
        }
        let above = nodes.iter().find_map(|node| {
            let depth = node.layer_names.iter().position(|name| name == node_name)?;
            Some(node.layer_name(depth - 1))
        });
        Err(CommandError::new(match above {
            Some(above) => format!("Node '{node_name}' is busy: node is used as backing hd of '{above}'"),
            None => format!("Cannot find device='{device}' nor node-name='{node_name}'"),
        }))
    }

    /// Decides what a layer that comes on top of a disk will be called.
    ///
    /// # Errors
    /// When the name that is `wanted` cannot be one, or is taken. What the reference says then.
    pub(super) fn name_for_top(&self, node: &Node, wanted: Option<&str>) -> Result<String, CommandError> {
        let Some(name) = wanted else { return Ok(node.made_up(node.layer_names.len())) };
        let list = self.list();
        if list.iter().any(|node| node.name == name || node.layer_names.iter().any(|known| known == name)) {
            return Err(CommandError::new("New overlay node-name already in use"));
        }
        check_name(name).map_err(CommandError::new)?;
        Ok(name.to_owned())
    }

    /// A layer of that name was put on top of a disk.
    pub(super) fn put_on_top(&self, device: &str, layer_name: String) {
        if let Some(node) = self.list().iter_mut().find(|node| node.name == device) {
            node.layer_names.insert(0, layer_name);
        }
    }

    /// Held by commands that change what layers are called, or which snapshots they have: names are looked at first.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn list(&self) -> MutexGuard<'_, Vec<Node>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a node may be called so; otherwise why not, as the reference says it.
fn check_name(name: &str) -> Result<(), String> {
    if !is_well_formed(name) {
        return Err(format!("Invalid node-name: '{name}'"));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err("Node name too long".to_owned());
    }
    Ok(())
}
