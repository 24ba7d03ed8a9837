//! Places of those who are with other regions.
//!
//! The rule: there are so many, and no tenant has more than four fifths of them, so that nobody else is kept from
//! leaving by it.

use std::collections::HashMap;

use parking_lot::Mutex;

#[derive(Debug)]
pub struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// By the tenant's number; those that have any.
    tenants: HashMap<u32, usize>,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    Full,
    /// The tenant has all that it may have.
    TenantFull,
}

impl NoPlace {
    /// For a metric's label.
    pub fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::TenantFull => "tenant-full",
        }
    }
}

/// It is free again when this is dropped.
#[derive(Debug)]
pub struct Place<'a> {
    places: &'a Places,
    tenant: u32,
}

impl Places {
    pub fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// `tenant`: its number.
    pub fn take(&self, tenant: u32) -> Result<Place<'_>, NoPlace> {
        let taken = &mut *self.taken.lock();
        if taken.all >= self.most {
            return Err(NoPlace::Full);
        }
        let own = taken.tenants.entry(tenant).or_default();
        if *own >= self.most * 4 / 5 {
            return Err(NoPlace::TenantFull);
        }
        *own += 1;
        taken.all += 1;
        Ok(Place { places: self, tenant })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let taken = &mut *self.places.taken.lock();
        taken.all -= 1;
        if let Some(own) = taken.tenants.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                taken.tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tenant_takes_all_places_and_each_comes_back() {
        let places = Places::new(10);
        let mut taken: Vec<_> = (0..8).map(|_| places.take(1).unwrap()).collect();
        assert_eq!(places.take(1).err(), Some(NoPlace::TenantFull));
        taken.extend([places.take(2).unwrap(), places.take(3).unwrap()]);
        assert_eq!(places.take(4).err(), Some(NoPlace::Full));
        taken.remove(0);
        drop(places.take(1).unwrap());
        drop(taken);
        let taken = places.taken.lock();
        assert_eq!((taken.all, taken.tenants.len()), (0, 0));
    }
}
