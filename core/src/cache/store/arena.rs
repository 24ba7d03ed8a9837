//! Places for values, addressed by 32-bit indexes that stay the same while the value lives.

use std::ops::{Index, IndexMut, Range};

/// No place.
pub const NONE: u32 = u32::MAX;

/// The caller frees each place once, uses none after that, and keeps the places below [`NONE`]. A freed
/// value stays, unread, until its place is used again.
pub struct Arena<T> {
    places: Vec<T>,
    free: Vec<u32>,
}

impl<T> Arena<T> {
    pub fn put(&mut self, value: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self[index] = value;
            return index;
        }
        self.places.push(value);
        self.places.len() as u32 - 1
    }

    pub fn free(&mut self, index: u32) {
        self.free.push(index);
    }

    /// Every place, free ones included.
    pub fn indexes(&self) -> Range<u32> {
        0..self.places.len() as u32
    }
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Index<u32> for Arena<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        &self.places[index as usize]
    }
}

impl<T> IndexMut<u32> for Arena<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        &mut self.places[index as usize]
    }
}
