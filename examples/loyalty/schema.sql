create table if not exists points (customer_id text primary key, points integer not null);
